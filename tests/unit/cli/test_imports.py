"""What commands import: nothing heavy that they do not use, because most of their time is imports.

Each command runs in a Python of its own, which prints its modules. Not here: the time that commands
take (benchmarks).
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

#: Prints the modules of a command line that ran, also if it failed.
PROGRAM = """
import atexit, sys
from onecopy.__main__ import main
atexit.register(lambda: print(sorted(sys.modules), file=sys.__stderr__))
main()
"""
#: Libraries of a few commands.
NEVER = ("numpy", "rich", "xxhash", "dataclasses", "click.shell_completion", "importlib.resources")
#: Modules that only starts, and commands that talk to a guest, need.
OF_GUESTS = ("asyncio", "ssl", "socket", "logging", "subprocess", "qemu.qmp", "onecopy.vmm.spawn")
#: Modules of a boot, of added resources and of programs in guests.
OF_OTHERS = (
    "onecopy.guest.exec",
    "onecopy.guest.lifecycle.bootplan",
    "onecopy.guest.lifecycle.hot_add",
    "onecopy.images.fs_image",
    "onecopy.sharing.report",
)


def modules_of(home: Path, *words: str) -> set[str]:
    """Return the modules that a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env={"ONECOPY_HOME": str(home), "XDG_RUNTIME_DIR": str(home.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return set(ast.literal_eval(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("words", "used", "unused"),
    [
        (["--version"], ["onecopy.cli"], [*NEVER, *OF_GUESTS, "msgspec", "json", "pathlib"]),
        (["--help"], ["onecopy.cli"], [*NEVER, *OF_GUESTS, "msgspec", "json", "pathlib"]),
        (["ps"], ["onecopy.guest.runtime"], [*NEVER, *OF_GUESTS, *OF_OTHERS, "hashlib", "shutil"]),
        (["ls"], ["onecopy.store"], [*NEVER, *OF_GUESTS, *OF_OTHERS, "hashlib", "shutil"]),
        # It fails before QEMU starts, and QEMU's protocol is loaded only after that.
        (
            ["run", "nothing"],
            ["onecopy.guest.lifecycle.launcher"],
            [*NEVER, *OF_OTHERS, "qemu.qmp", "tempfile"],
        ),
        (["exec", "nobody", "true"], ["onecopy.guest.exec"], [*NEVER, "onecopy.vmm.spawn"]),
    ],
    ids=" ".join,
)
def test_a_command_imports_only_what_it_uses(
    words: list[str], used: list[str], unused: list[str], tmp_path: Path
) -> None:
    found = modules_of(tmp_path / "home", *words)
    assert set(used) <= found
    assert sorted(found & set(unused)) == []
