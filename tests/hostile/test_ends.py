"""Every command with its everyday surroundings broken: an error of ours or success, and no hang.

The cases run in children of one process that has loaded all commands, with real descriptors, limits
and folders; a few run as whole commands, as Python itself starts otherwise without its streams.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest

from onecopy import cli
from onecopy.cli.params import SecondsType
from onecopy.errors import OnecopyError
from onecopy.store import Store
from tests.hostile.ends import CONDITIONS, Ended, Forked
from tests.unit.store_kit import check_whole, put

#: A cheap way to use each command: what it says to nothing, to a wrong name, or its help.
CHEAP = {
    "build": "build a --from dir:no-such-folder",
    "create": "create a",
    "save": "save a --root nothing",
    "boot": "boot nothing",
    "run": "run nothing",
    "pool": "pool",
    "ps": "ps",
    "exec": "exec nobody true",
    "cp": "cp nobody:/x here",
    "attach": "attach nobody app:1",
    "detach": "detach nobody app",
    "commit": "commit nobody app",
    "serve": "serve --help",
    "console": "console nobody",
    "logs": "logs nobody",
    "stop": "stop --all",
    "ls": "ls",
    "inspect": "inspect app:1",
    "verify": "verify app:1",
    "preload": "preload app:1",
    "tag": "tag app:1 app:2",
    "write": "write app:1",
    "grant": "grant app web-1",
    "revoke": "revoke app web-1",
    "rm": "rm nothing app:3",
    "report": "report --help",
    "top": "top --help",
    "advise": "advise --help",
    "plan": "plan nothing --guests 3",
    "ksm": "ksm --help",
    "disks": "disks --json",
    "doctor": "doctor --help",
    "demo": "demo --help",
    "completion": "completion bash",
}
_CODES = {*range(25), 125, 130, 141}


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    # In memory, if that can be: hundreds of commands wait for no disk.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        store = Store(Path(folder) / "home")
        put(store, "app:1")
        put(store, "app:3", b"other")
        with closing(Forked(store.root)) as served:
            yield served


def test_every_command_has_a_case() -> None:
    assert set(CHEAP) == set(cli.COMMANDS)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_command_ends_well(forked: Forked, condition: str) -> None:
    for name, line in CHEAP.items():
        for words in (line.split(), [name, "--help"]):
            ended = forked.run(condition, words)
            where = f"{condition}: {' '.join(words)}: {ended}"
            assert ended.code in _CODES, where
            assert "Traceback" not in ended.told, where
            assert "internal error" not in ended.told, where
            if words[-1] == "--help":
                wanted = CONDITIONS[condition]
                assert ended.code == (125 if (name, wanted) == ("exec", 23) else wanted), where
    check_whole(forked.home)


_ONECOPY = [sys.executable, "-m", "onecopy"]


def _shell(line: str, home: Path) -> Ended:
    environment = {**os.environ, "ONECOPY_HOME": str(home)}
    argv = ["bash", "-c", f'onecopy() {{ "{sys.executable}" -m onecopy "$@"; }}; {line}']
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=60, check=False)
    return Ended(done.returncode, done.stderr.decode(errors="replace"), done.stdout)


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("onecopy ls <&- >&- 2>&-", 23, ""),
        ("onecopy ls >&-", 23, "standard output cannot be written: it is closed"),
        ("onecopy ls >/dev/full", 23, "No space left on device"),
        ("onecopy ls >/dev/full 2>/dev/full", 23, ""),
        ("onecopy rm nothing 2>/dev/full", 3, ""),
        ("onecopy rm nothing 2>&-", 3, ""),
        ("onecopy ls | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("for n in {1..2000}; do set -- $* app:1; done; onecopy verify $* | head -1 >/dev/null;"
         "exit ${PIPESTATUS[0]}", 141, ""),
        ("onecopy create live --range SC:2M; onecopy write live <&-", 24, "input cannot be read"),
        ("ulimit -n 20; onecopy ps", 0, ""),
        ("ulimit -n 6; onecopy stop --all", 24, "too many open files"),
        ("mkdir gone; cd gone; rmdir ../gone; onecopy cp a b", 2, "has to be in a guest"),
        ("mkdir gone; cd gone; rmdir ../gone; ONECOPY_HOME=here onecopy ls", 3, "was deleted"),
        ("PYTHONIOENCODING=ascii onecopy ls --json", 0, ""),
        ("LC_ALL=xx_YY.nonsense onecopy inspect $'\\xff'", 2, "is not a valid name"),
        ("onecopy run --name $'a\\xff' app", 2, "is not a valid guest name"),
        ("onecopy build a --from dir:$'\\xff'", 8, "No such file or directory"),
        ("onecopy cp $'\\xff' nobody:$'/\\xff'", 3, "no guest"),
        ("onecopy exec nobody $'\\xff'", 125, "no guest"),
        ("_ONECOPY_COMPLETE=bash_complete COMP_WORDS='onecopy rm ' COMP_CWORD=2 onecopy >/dev/full",
         23, "No space"),
    ],
)  # fmt: skip
def test_whole_commands(tmp_path: Path, line: str, code: int, told: str) -> None:
    put(Store(tmp_path / "home"), "app:1")
    ended = _shell(f"cd {tmp_path}; {line}", tmp_path / "home")
    assert (ended.code, told in ended.told) == (code, True), ended
    assert "Traceback" not in ended.told
    assert told or not ended.told
    check_whole(tmp_path / "home")


def test_no_file_of_the_store_becomes_standard_output(tmp_path: Path) -> None:
    put(Store(tmp_path), "app:1")
    _shell("onecopy tag app:1 app:2 <&- >&- 2>&-", tmp_path)
    assert set(check_whole(tmp_path)) == {"app:1", "app:2"}


def test_debug_shows_where(tmp_path: Path) -> None:
    put(Store(tmp_path), "app:1")
    ended = _shell("ONECOPY_DEBUG=1 onecopy rm nothing", tmp_path)
    assert (ended.code, "Traceback" in ended.told) == (3, True)


ODD = [
    *("9" * 5000, "-" + "9" * 5000, "nan", "NaN", "inf", "-inf", "1e999", "1e-999", "0x10"),
    # No argument of a program has a NUL in it.
    *("1" + "0" * 400, "", " ", "\udcff", "٣", "1\n", "9" * 5000 + "M", "1" * 5000 + ":80"),
    *("a:" + "9" * 5000, "a@sha256:" + "0" * 5000, "-", "--", "a" * 10**6, "/" * 5000, ":/" * 99),
]


def _params() -> list[tuple[str, click.Parameter]]:
    found = []
    for name in cli.COMMANDS:
        command = cli.onecopy.get_command(click.Context(cli.onecopy), name)
        assert command
        parts = [command]
        if isinstance(command, click.Group):
            parts += command.commands.values()
        found += [(f"{name} {each.name}", param) for each in parts for param in each.params]
    return found


def test_no_value_breaks_an_option() -> None:
    """Each parameter takes an odd value or refuses it; what is a time is finite."""
    for where, param in _params():
        context = click.Context(click.Command("x"))
        for value in ODD:
            try:
                found = param.type.convert(value, param, context)
            except (click.UsageError, OnecopyError) as error:
                assert len(str(error)) < 10**6 + 1000, where
                continue
            if isinstance(found, float):
                assert isinstance(param.type, SecondsType), where
                assert 0 <= found < 10**8, (where, value)
            elif isinstance(found, int):
                assert abs(found) < 1 << 63, (where, value)
    assert any(isinstance(param.type, SecondsType) for _, param in _params())
