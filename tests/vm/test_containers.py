"""Storage of container engines is not on an overlay, so that they can use overlays themselves.

A file with the engine's name stands for it. Not here: the behaviour of podman and Docker.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.vm.conftest import Boot, RunIn

#: A container's root over an image's, both kept in the folder $1; prints what it sees.
OVERLAY = """\
cd $1 && mkdir lower upper work merged && echo image >lower/file
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged || exit
echo container >merged/new
mv merged/file merged/moved
cat merged/* upper/new
"""


@pytest.fixture
def engines_root(host: Runtime, tmp_path: Path) -> Artifact:
    """Root segment: busybox, podman, and Docker with something that it keeps."""
    for name in ("bin/busybox", "usr/bin/podman", "usr/sbin/dockerd"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("/bin/busybox", tmp_path / name)
    (tmp_path / "bin/sh").symlink_to("busybox")
    (tmp_path / "var/lib/docker/image").mkdir(parents=True)
    return build_segment(host.store, Reference("engines"), f"dir:{tmp_path}")


def test_what_engines_keep(boot: Boot, engines_root: Artifact, run_in: RunIn) -> None:
    guest = boot(engines_root, memory=128 * MIB)

    def tried(folder: str) -> tuple[int, str]:
        done = run_in(guest, "sh", "-c", OVERLAY, "sh", folder)
        return done.exit_code, done.stdout.decode()

    # On the root itself it does not work: else there is nothing to do.
    assert run_in(guest, "mkdir", "/srv").exit_code == 0
    assert tried("/srv")[0] != 0
    assert tried("/var/lib/containers") == (0, "image\ncontainer\ncontainer\n")
    # It counts as the root's: one limit for both.
    sizes = run_in(guest, "stat", "-f", "-c", "%b", "/", "/var/lib/containers").stdout.split()
    assert sizes[0] == sizes[1]
    # What the image has stays in sight.
    assert run_in(guest, "ls", "/var/lib/docker").stdout == b"image\n"
    assert not run_in(guest, "ls", "/var/lib/containerd").stdout
