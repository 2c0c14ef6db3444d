"""`onecopy --debug`: what it writes, what it leaves out, and that it costs nothing when off."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ONECOPY, onecopy

LINE = re.compile(r"onecopy: debug: \+\d+\.\d{3} ([a-z-]+)((?: [a-z]+=.*)?)$")


def debugged(program: str, *, code: int = 0) -> list[str]:
    """Lines of a program that has enabled it."""
    argv = [sys.executable, "-c", f"from onecopy.cli import debug; debug.enable()\n{program}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr.splitlines()


def test_a_command_tells_its_steps_and_programs(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a").write_text("content")
    build = ["build", "app", "--from", f"dir:{tmp_path / 'files'}"]
    done = onecopy("--debug", *build, home=tmp_path / "store")
    lines = [LINE.match(line) for line in done.stderr.splitlines()]
    assert all(lines), done.stderr
    kinds = [line[1] for line in lines if line]
    assert kinds[0] == "onecopy" and {"step", "program"} <= set(kinds)
    assert "mkfs.erofs" in done.stderr
    # What it prints is not touched, and it says nothing unless it is asked.
    quiet = onecopy(*build, home=tmp_path / "other")
    assert quiet.stdout == done.stdout
    assert "debug" not in quiet.stderr


@pytest.mark.parametrize("by", ["option", "variable"])
def test_errors_show_where_they_arise(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "variable":
        monkeypatch.setenv("ONECOPY_DEBUG", "1")
    argv = [ONECOPY, *(["--debug"] if by == "option" else [])]
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path))
    done = subprocess.run([*argv, "rm", "nothing"], capture_output=True, text=True)
    assert done.returncode == 3
    assert "Traceback" in done.stderr and "debug: +" in done.stderr


def test_secrets_are_left_out() -> None:
    program = (
        "import subprocess\n"
        "subprocess.run(['sh', '-c', 'true s3cret'], env={'KEY': 's3cret'})\n"
        "subprocess.run(['sh', '-s'], input=b'true s3cret')\n"
        "subprocess.run(['true', '-append', 'console s3cret', 'shown'])\n"
    )
    lines = debugged(program)
    assert len(lines) == 4
    assert "s3cret" not in "\n".join(lines)
    assert 'argv="sh -c [...]"' in lines[1]
    assert 'argv="true -append [...] shown"' in lines[3]


def test_lines_are_bounded_and_show_as_text() -> None:
    from onecopy.cli.debug import LINE_LIMIT, VALUE_LIMIT

    (_, long) = debugged("debug.event('it', text='x' * 10**6)")
    assert VALUE_LIMIT < len(long) < VALUE_LIMIT + 100
    (_, odd) = debugged("debug.event('it', text='a\\x1b[1m\\n\"b')")
    assert json.loads(odd.partition("text=")[2]) == 'a\\x1b[1m\\x0a"b'
    many = debugged(f"for n in range({2 * LINE_LIMIT}): debug.event('it', n=n)")
    assert len(many) == LINE_LIMIT
    assert many[-1].endswith(f"cut lines={LINE_LIMIT}")


def test_messages_of_qmp_are_told() -> None:
    program = (
        "import logging\n"
        "log = logging.getLogger('qemu.qmp.protocol.web')\n"
        "log.debug('--> %s', '{\\n  \"execute\": \"stop\"\\n}')\n"
        "log.debug('<-- %s', '{\"return\": {}}')\n"
        "log.debug('Disconnected.')\n"
    )
    _, sent, received = debugged(program)
    assert sent.endswith(' qmp-sent message="{ \\"execute\\": \\"stop\\" }"')
    assert " qmp-received message=" in received


def test_it_costs_nothing_when_it_is_off(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from onecopy.cli import main\n"
        "main(['ls'])\n"
        "print('onecopy.cli.debug' in sys.modules)\n"
    )
    argv = [sys.executable, "-c", program]
    env = {"ONECOPY_HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.stdout.splitlines()[-1] == "False"
