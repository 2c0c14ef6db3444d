"""Processes of others that claim to be QEMUs: impostor.c under any name, with any arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import cannot_run
from tests.unit.other_user import NOBODY

SOURCE = Path(__file__).with_suffix(".c")


def compile_impostor(folder: Path) -> Path:
    """The program, called as QEMU is, where every user finds it."""
    if shutil.which("gcc") is None:
        cannot_run("there is no gcc")
    program = folder / "qemu-system-x86_64"
    subprocess.run(["gcc", "-static", "-Os", "-o", program, SOURCE], check=True)
    folder.chmod(0o755)
    return program


@contextmanager
def impostor(
    program: Path,
    arguments: Sequence[str | bytes] = (),
    mode: str = "",
    uid: int = NOBODY,
    name: str = "qemu-system-x86_64",
) -> Iterator[subprocess.Popen[bytes]]:
    """One process that waits, until the end of the block; of root's none but ``uid`` 0."""
    env = {"IMPOSTOR": mode} | ({"IMPOSTOR_UID": str(uid)} if uid else {})
    process = subprocess.Popen(
        [name, *arguments], executable=program, env=env, cwd="/", stdout=subprocess.PIPE
    )
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def require_root() -> None:
    """Only root can be other users, and look at them."""
    if os.geteuid():
        cannot_run("only root can start processes of other users")
