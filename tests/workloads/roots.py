"""Builds the roots of workloads: Debian roots, and small trees.

Not here: the roots of other tests (tests/vm/kept.py).
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from onecopy.errors import BadSource
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.images.deb_packages import fetch_package
from onecopy.images.normalise import normalise
from onecopy.model import Reference
from onecopy.store import Artifact
from onecopy.subprocesses import run
from tests.workloads.catalogue import TREES, Root
from tests.workloads.places import PROGRAMS

Tell = Callable[[str], None]


def ensure_root(host: Runtime, root: Root, tell: Tell) -> Artifact:
    """The root of a workload, built if it is not there; raises as building does."""
    ref = Reference(root.name, root.suite)
    found = host.store.find(ref, "segment")
    if found:
        return found
    tell(f"building {ref}")
    if root.suite in TREES:
        with host.store.workspace() as work:
            _TREES[root.suite](work)
            return build_segment(host.store, ref, f"dir:{work / 'tree'}")
    try:
        return build_segment(
            host.store, ref, f"debian:{root.suite}", BuildOptions(include=root.packages)
        )
    except BadSource as error:
        if "is expired" not in error.message:
            raise
    tell(f"the mirror of {root.suite} is old: its date is not checked")
    return _build_of_old_mirror(host, ref, root)


def _build_of_old_mirror(host: Runtime, ref: Reference, root: Root) -> Artifact:
    """Build a Debian root, as `debian:` does, of a mirror that has not been renewed for long."""
    with host.store.workspace() as work:
        tree, packages = work / "tree", ",".join((*root.packages, "udev", "kmod"))
        argv = ["unshare", "--mount", "mmdebstrap", "--variant=minbase", f"--include={packages}"]
        argv += ['--aptopt=Acquire::Check-Valid-Until "false"', "--format=directory"]
        began = time.time()
        run([*argv, root.suite, tree])
        normalise(tree, began)
        return build_segment(host.store, ref, f"dir:{tree}")


def _busybox(work: Path) -> None:
    """/bin with busybox and its applets, and nothing else."""
    folder = work / "tree/bin"
    folder.mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "busybox")
    listed = subprocess.run(["/bin/busybox", "--list"], capture_output=True, text=True, check=True)
    for applet in listed.stdout.split():
        if applet != "busybox":
            (folder / applet).symlink_to("busybox")


def _musl(work: Path) -> None:
    """The same with musl's C library, and a program that was built for it."""
    _busybox(work)
    parts = work / "parts"
    for name in ("musl", "musl-dev", "musl-tools"):
        fetched = work / name
        fetched.mkdir()
        package = fetch_package((name,), "trixie", fetched, lambda _: None)
        run(["dpkg-deb", "--extract", package, parts])
    specs = next(parts.rglob("musl-gcc.specs"))
    specs.write_text(specs.read_text().replace("/usr/", f"{parts}/usr/"))
    program = work / "tree/bin/musl"
    run(["gcc", "-specs", specs, "-O2", "-o", program, PROGRAMS / "musl.c"])
    library = work / "tree/lib"
    library.mkdir()
    shutil.copy(next(parts.rglob("libc.so")), library / "ld-musl-x86_64.so.1")


_TREES = {"busybox": _busybox, "musl": _musl}
