"""Runs programs in the root of an emulated host, but on this host's kernel (vmtest/chroot)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from onecopy.model import Reference
from onecopy.store import Store

_CHROOT = Path(__file__).with_name("chroot")


def run_in_root(
    store: Store, segments: Mapping[str, Reference], results: Path, argv: Sequence[str]
) -> int:
    """Run a program in the project's tree; return its exit code.

    Args:
        segments: ROOT, PYTHON, TREE and others, as vmtest/chroot names them.
        results: the directory that the program sees as /run/results.
    """
    images = {name: store.resolve(ref).layer("image").path for name, ref in segments.items()}
    env = {name: str(path) for name, path in images.items()}
    env |= {"RESULTS": str(results.resolve()), "PATH": os.environ["PATH"]}
    return subprocess.run([_CHROOT, *argv], env=env).returncode
