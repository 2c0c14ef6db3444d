"""report, advise, top, doctor and ksm, while other users' processes claim to be QEMUs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from onecopy import cli

# Imported before it is the turn of a user who cannot reach them.
from onecopy.cli import advise_cmd, report_cmd, top_cmd  # noqa: F401
from onecopy.guest.observe import advise, plan, top  # noqa: F401
from onecopy.guest.observe.accounts import vmm_maps
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
from onecopy.sharing import live_figures, report
from onecopy.store import Artifact
from onecopy.vmm import external_qemu
from tests.command import ONECOPY
from tests.hostile.impostor import compile_impostor, impostor, require_root
from tests.unit.other_user import NOBODY, as_nobody

#: Seconds for a command among all of them, on a busy machine; the hang that is meant has no end.
STUCK = 100
OTHER = NOBODY - 1
DEEP = '{"driver":' * 5000
#: What no QEMU would take, and some that it would; {} is a folder.
COMMAND_LINES: list[list[str | bytes]] = [
    [],
    [""],
    ["-m", ""],
    ["-m", "size=" + "9" * 5000],
    ["-m", "99999999999T"],
    ["-m", "\u0665\u0666"],
    ["-m", '{"size": [1]}'],
    ["-name", b"\xff\xfe\x1b]0;owned\x07\nonecopy: all is well"],
    ["-name", "guest=[red]x[/red][link=http://evil]y"],
    ["-name", "x" * 100_000],
    ["-machine", '{"type": 5, "memory-backend": {"a": 1}}'],
    ["-machine", "memory-backend=r", "-object", '{"qom-type":"memory-backend-file","id":["r"]}'],
    ["-machine", "memory-backend=r", "-object", '{"qom-type":7,"id":"r","mem-path":8}'],
    ["-object", "memory-backend-file,id=a,mem-path={}/fifo", "-machine", "memory-backend=a"],
    ["-object", "memory-backend-file,id=a,mem-path={}/fifo", "-m", "64M"],
    ["-mem-path", "{}/fifo"],
    ["-mem-path", "{}/secret"],
    ["-mem-path", "{}/loop"],
    ["-mem-path", "/dev/zero"],
    ["-mem-path", "/root/not/for/you"],
    ["-mem-path", "a/" * 50_000],
    ["-object", '{"qom-type":"memory-backend-file","id":"x","mem-path":"a\\u0000b"}'],
    ["-blockdev", '{"driver":"file","filename":17}'],
    ["-blockdev", '{"file": 1e400, "filename": null}'],
    ["-blockdev", DEEP],
    ["-blockdev", "[" * 60_000],
    ["-blockdev", '{"node-name": ' + "1" * 5000 + "}"],
    ["-drive", "file={}/fifo", "-hda", "{}/secret", "-cdrom", "{}/loop"],
    ["-drive", "," * 60_000],
    ["-x" * 50_000] * 18,
    ["-hda", "/x/y"] * 5000,
]


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    require_root()
    # pytest closes its own folders to others, those of another session's at each start.
    with tempfile.TemporaryDirectory(prefix="onecopy-test") as name:
        folder = Path(name)
        os.mkfifo(folder / "fifo")
        (folder / "fifo").chmod(0o666)
        (folder / "secret").write_bytes(b"secret" * 10_000)
        (folder / "secret").chmod(0o600)
        (folder / "loop").symlink_to("loop")
        (folder / "home").mkdir(mode=0o700)
        os.chown(folder / "home", NOBODY, NOBODY)
        yield compile_impostor(folder)


@pytest.fixture
def crowd(program: Path) -> Iterator[set[int]]:
    """The pids of one of each kind, of two users and of root."""
    with ExitStack() as stack:
        pids = set()
        kinds = [(argv, "") for argv in COMMAND_LINES]
        kinds += [(["-m", "64M"], mode) for mode in ("mappings", "arguments")]
        kinds += [(["x" * 200, "-m", "64M"], "rewrite"), (["-m", f"{64 << 20}"], "huge")]
        kinds += [(["-hda", "{}/secret"], f"path:{program.parent}/secret")]
        for number, (argv, mode) in enumerate(kinds):
            filled = [
                each.replace("{}", str(program.parent)) if isinstance(each, str) else each
                for each in argv
            ]
            uid = (NOBODY, OTHER, 0)[number % 3]
            process = stack.enter_context(impostor(program, filled, mode, uid))
            pids.add(process.pid)
        ended = stack.enter_context(impostor(program))
        ended.kill()
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        yield pids


def onecopy(home: Path, *args: str) -> str:
    """What it prints, within bounds of time and memory."""
    env = os.environ | {"ONECOPY_HOME": str(home)}
    limited = ["prlimit", f"--as={4 << 30}", ONECOPY, *args]
    done = subprocess.run(
        limited, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=STUCK
    )
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    # Not even in a name.
    assert not {"\x1b", "\x9b", "\x07", "\r"} & set(text + done.stderr.decode())
    return text


def test_root_sees_them_all(crowd: set[int], program: Path, tmp_path: Path) -> None:
    told = json.loads(onecopy(tmp_path, "report", "--json"))
    rows = {each["pid"]: each for each in told["others"]}
    assert crowd <= rows.keys()
    secret, fifo = (str(program.parent / name) for name in ("secret", "fifo"))
    assert not {secret, fifo} & {blob["path"] for blob in told["blobs"]}
    assert not any(rows[pid]["ram_path"] for pid in crowd)
    notes = [rows[pid]["note"] for pid in crowd]
    assert sum("does not have the file open" in note for note in notes) >= 6
    assert sum("is larger than 16 MiB" in note for note in notes) == 1
    # The others have all their figures.
    assert sum(rows[pid]["pss_total"] is not None for pid in crowd) == len(crowd) - 1
    text = onecopy(tmp_path, "report")
    assert r"\xff\xfe\x1b]0;owned\x07\x0aonecopy: all is well" in text
    assert "[red]x[/red][link=http://evil]y" in text


def test_root_is_advised(crowd: set[int], program: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    told = json.loads(onecopy(tmp_path, "advise", "--json", "--html", str(page)))
    assert crowd <= {each["pid"] for each in [*told["guests"], *told["left_out"]]}
    # The one of 64 TiB, of which nearly nothing is there.
    assert any("more than this host has" in each["reason"] for each in told["left_out"])
    assert str(program.parent) not in json.dumps(told["steps"]) + json.dumps(told["files"])
    assert not {"\x1b", "\x07"} & set(page.read_text())


def test_root_watches(crowd: set[int], host: Runtime) -> None:
    pids = {line.split()[-7] for line in _rows(onecopy(host.store.root, "top", "--interval", "1"))}
    assert {str(pid) for pid in crowd} <= pids
    onecopy(host.store.root, "ksm")
    assert "accelerator" in onecopy(host.store.root, "doctor")


def test_root_plans(crowd: set[int], host: Runtime, saved: Artifact) -> None:
    size = plan.Size(first=1, more=1, settle=0.2)
    found = asyncio.run(plan.measure(host, saved, size))
    assert crowd and found.clones == 2 and found.each > MIB


def _rows(text: str) -> list[str]:
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("GUEST"))
    return lines[first + 1 : lines.index("", first)]


def test_an_ordinary_user_sees_what_may_be_seen(crowd: set[int], program: Path) -> None:
    place = program.with_name("home")
    home = {"ONECOPY_HOME": str(place / "store"), "XDG_RUNTIME_DIR": str(place)}

    def look() -> list[Any]:
        signal.alarm(STUCK)
        os.environ.update(home)
        return [
            _called("report", "--json"),
            _called("report"),
            _called("advise", "--json"),
            _called("top", "--interval", "0.2"),
        ]

    (code, report), *others = as_nobody(look)
    assert (code, {each[0] for each in others}) == (0, {0}), others
    rows = {each["pid"]: each for each in json.loads(report)["others"]}
    # What another's process is called is what it says, and one says nothing.
    assert len(crowd - rows.keys()) == 1
    hidden = [pid for pid in crowd & rows.keys() if "cannot open" in rows[pid]["note"]]
    # Two of three are others'.
    assert len(hidden) >= len(crowd) * 2 // 3 - 1
    assert all(rows[pid]["ram_private"] is None for pid in hidden)


def _called(*args: str) -> tuple[int, str]:
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        return cli.main(list(args)), sys.stdout.getvalue()
    finally:
        sys.stdout = before


def test_memory_that_keeps_its_reader_waiting(program: Path, tmp_path: Path) -> None:
    with impostor(program, ["-m", "64M", "-name", "trap"], "trap") as process:
        began = time.monotonic()
        told = json.loads(onecopy(tmp_path, "advise", "--json"))
        assert time.monotonic() - began < STUCK
    caught = {each["pid"]: each["reason"] for each in told["left_out"]}
    assert "took too long" in caught[process.pid]


def test_many_of_one_user_hide_nobody_else(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_qemu, "MOST", 6)
    known = {vmm.pid for vmm in external_qemu.find(()).vmms}
    with ExitStack() as stack:
        many = {stack.enter_context(impostor(program)).pid for _ in range(20)}
        one = stack.enter_context(impostor(program, uid=OTHER)).pid
        found = external_qemu.find(known - many - {one})
    seen = {vmm.pid for vmm in found.vmms}
    assert one in seen and 0 < len(seen & many) < 6 and len(seen) <= 6, found
    assert found.left_out


def test_only_what_is_open_is_taken(program: Path) -> None:
    secret, alias = program.with_name("secret"), program.with_name("alias")
    alias.symlink_to(secret)
    with (
        impostor(program, ["-hda", f"{alias}"], f"open:{secret}", uid=0) as honest,
        impostor(program, ["-hda", f"{secret}"], f"path:{secret}") as liar,
        impostor(program, ["-hda", f"{secret}"], f"open:{program.parent}/fifo") as other,
    ):
        vmms = {vmm.pid: vmm for vmm in external_qemu.find(()).vmms}
    known = secret.stat()
    assert vmms[honest.pid].disks == (str(secret),)
    assert vmms[honest.pid].regular == {str(secret): (known.st_dev, known.st_ino)}
    assert vmms[liar.pid].disks == vmms[other.pid].disks == ()


#: QEMUs, so to speak, of some hundredths of a second each.
COMING_AND_GOING = """
while :; do "$0" -m 64M & a=$!; "$0" -m 64M & b=$!; sleep 0.0$((RANDOM % 5)); kill -9 $a $b; done
"""


def test_they_end_while_they_are_read(program: Path) -> None:
    argv = ["bash", "-c", COMING_AND_GOING, str(program)]
    silent = subprocess.DEVNULL
    with subprocess.Popen(argv, stdout=silent, stderr=silent, process_group=0) as source:
        try:
            began, seen = time.monotonic(), set[int]()
            # On a busy machine few come and go.
            while (past := time.monotonic() - began) < 5 or (len(seen) <= 10 and past < STUCK):
                found = external_qemu.find(())
                seen |= {vmm.pid for vmm in found.vmms}
                told = report.collect([], map(vmm_maps, found.vmms))
                live_figures.sample([(vmm.name, vmm.pid) for vmm in found.vmms], merging=True)
                for each in told.others:
                    # Of one that was ending nothing is said, rather than less than it had.
                    assert each.note or (each.pss_total or 0) > 0
        finally:
            os.killpg(source.pid, signal.SIGKILL)
    assert len(seen) > 10


def test_another_file_of_the_same_name(program: Path) -> None:
    """In a mount namespace of its own a process can open what it likes under any name."""
    secret, evil = program.with_name("secret"), program.with_name("evil")
    evil.write_bytes(b"evil")
    evil.chmod(0o666)
    script = f"mount --bind {evil} {secret} && exec {program} -hda {secret}"
    argv = ["unshare", "--mount", "sh", "-c", script]
    env = os.environ | {"IMPOSTOR": f"open:{secret}", "IMPOSTOR_UID": str(OTHER)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            (vmm,) = (vmm for vmm in external_qemu.find(()).vmms if vmm.pid == process.pid)
        finally:
            process.kill()
    assert (vmm.disks, vmm.regular) == ((), {})
