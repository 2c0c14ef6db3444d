"""Runs programs in the root of an emulated host, but on this host's kernel (vmtest/chroot)."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from onecopy.model import Reference
from onecopy.store import Store

_CHROOT = Path(__file__).with_name("chroot")


def run_in_root(
    store: Store, segments: Mapping[str, Reference], results: Path, argv: Sequence[str]
) -> int:
    """Run a program in the project's tree; return its exit code.

    Ctrl-C is the program's to handle, because it has the same terminal. It is waited for.

    Args:
        segments: ROOT, PYTHON, TREE and others, as vmtest/chroot names them.
        results: the directory that the program sees as /run/results.
    """
    images = {name: store.resolve(ref).layer("image").path for name, ref in segments.items()}
    env = {name: str(path) for name, path in images.items()}
    with tempfile.TemporaryDirectory(prefix="onecopy-vmtest-", dir="/var/tmp") as base:
        env |= {"RESULTS": str(results.resolve()), "IMAGES": str(store.root.resolve())}
        env |= {"BASE": base, "PATH": os.environ["PATH"]}
        # In a mount namespace, whose mounts end with the program.
        command: list[str | Path] = ["unshare", "--mount", "--propagation=private", _CHROOT, *argv]
        with subprocess.Popen(command, env=env) as program:
            try:
                return program.wait()
            except KeyboardInterrupt:
                _wait(program)
                raise
            except BaseException:
                program.terminate()
                _wait(program)
                raise


def _wait(program: subprocess.Popen[bytes]) -> None:
    """Wait for its end, also if Ctrl-C comes again."""
    while program.returncode is None:
        with suppress(KeyboardInterrupt):
            program.wait()
