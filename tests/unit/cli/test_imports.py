"""What commands import: nothing heavy that they do not use, because most of their time is imports.

Each command runs in a Python of its own, which prints its modules. Not here: the time that commands
take (benchmarks).
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

#: Prints the modules of a command line that ran, also if it failed, but no stand-ins (later.py).
PROGRAM = """
import os, sys
from onecopy.__main__ import main
def leave(_):
    from onecopy.later import Later
    found = [name for name, each in sys.modules.items() if not isinstance(each, Later)]
    print(sorted(found), file=sys.__stderr__, flush=True)
    really(0)
really, os._exit = os._exit, leave
main()
"""
#: Libraries of a few commands.
NEVER = ("numpy", "rich", "xxhash", "dataclasses", "click.shell_completion", "importlib.resources")
#: What libraries import at once (later.py) and no command uses that only does its work.
UNUSED = (
    "inspect",
    "ast",
    "platform",
    "textwrap",
    "tokenize",
    "msgspec.inspect",
    "ssl",
    "_ssl",
    "typing_extensions",
)
#: Modules that only starts, and commands that talk to a guest, need.
OF_GUESTS = ("asyncio", "socket", "logging", "subprocess", "qemu.qmp", "onecopy.vmm.spawn")
#: Modules of a boot, of added resources and of programs in guests.
OF_OTHERS = (
    "onecopy.guest.exec",
    "onecopy.guest.lifecycle.bootplan",
    "onecopy.guest.lifecycle.boot",
    "onecopy.guest.lifecycle.hot_add",
    "onecopy.guest.lifecycle.restore",
    "onecopy.images.fs_image",
    "onecopy.images.kernel",
    "onecopy.sharing.report",
)
#: Modules with a small use in a start, for which the start has other ways.
UNNEEDED = ("secrets", "random", "shutil", "zlib", "json")
OF_LISTS = (*NEVER, *UNUSED, *OF_GUESTS, *OF_OTHERS, "shutil", "secrets")


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
        (
            ["--version"],
            ["onecopy.cli"],
            [*NEVER, *UNUSED, *OF_GUESTS, "msgspec", "json", "pathlib"],
        ),
        (["--help"], ["onecopy.cli"], [*NEVER, *OF_GUESTS, "msgspec", "json", "pathlib"]),
        (["ps"], ["onecopy.guest.runtime"], [*OF_LISTS, "hashlib"]),
        (["ls"], ["onecopy.store"], [*OF_LISTS, "hashlib"]),
        # It fails before QEMU starts, and QEMU's protocol is loaded only after that.
        (
            ["run", "nothing"],
            ["onecopy.guest.lifecycle.launcher"],
            [*NEVER, *UNUSED, *OF_OTHERS, *UNNEEDED, "qemu.qmp", "tempfile"],
        ),
        (
            ["exec", "nobody", "true"],
            ["onecopy.guest.exec"],
            [*NEVER, *UNUSED, "onecopy.vmm.spawn"],
        ),
    ],
    ids=" ".join,
)
def test_a_command_imports_only_what_it_uses(
    words: list[str], used: list[str], unused: list[str], tmp_path: Path
) -> None:
    found = modules_of(tmp_path / "home", *words)
    assert set(used) <= found
    assert sorted(found & set(unused)) == []
