"""What a cold guest is started with besides the segments: its initramfs.

The initramfs is two archives in a row (Linux Documentation/driver-api/early-userspace/
buffer-format.rst): the kernel's boot modules, kept in the store with it, and a small one with
busybox, the first stage (files/init) and what this guest is to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from onecopy.linux.removal import remove_tree
from onecopy.store.artifact import Layer
from onecopy.subprocesses import run

TOOLS_MOUNTPOINT = "/run/onecopy/tools"


class Mount(msgspec.Struct, frozen=True):
    """A range of a segment as the guest finds it."""

    slot: int
    """PCI slot of its virtio-pmem device."""
    fstype: str
    """"" if it has no file system."""
    mountpoint: str
    """"" if it is not mounted."""
    segment: str
    """Name of its segment."""
    name: str
    """Of the link to its device, /dev/onecopy/NAME."""
    writable: bool = False


class Boot(msgspec.Struct, frozen=True):
    """What a cold guest is to do."""

    hostname: str
    mounts: Sequence[Mount]
    modules: Sequence[str]
    """File names in the boot module archive, in loading order."""
    network: str
    """Its address and what goes with it, or "dhcp"; "-" for no network (guest/network.py)."""
    command: str | None
    """None: start the image's own init. Else run this with a minimal init; "" just stays up."""


def cpio(folder: Path) -> bytes:
    """The folder as an initramfs archive, the same for the same content."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            os.utime(path, (0, 0))
    out = folder.with_suffix(".cpio")
    listing = "".join(f"{name}\0" for name in names).encode()
    argv = ["cpio", "--create", "--null", "--format=newc", "--reproducible", "--quiet"]
    run([*argv, "--owner=+0:+0", f"--file={out}"], cwd=folder, stdin=listing)
    data = out.read_bytes()
    out.unlink()
    return data


def write_initrd(out: Path, boot: Boot, modules: Layer, busybox: Layer) -> None:
    """Write the initramfs for ``boot`` to ``out``; ``modules`` is the boot module archive."""
    folder = out.with_name(out.name + ".d")
    (folder / "bin").mkdir(parents=True)
    (folder / "onecopy").mkdir()
    for name in ("dev", "proc", "sys", "run"):
        (folder / name).mkdir()
    (folder / "bin/busybox").write_bytes(_content(busybox))
    (folder / "bin/busybox").chmod(0o755)
    (folder / "init").write_bytes(resource("init"))
    (folder / "init").chmod(0o755)
    for name, text in _config(boot).items():
        (folder / "onecopy" / name).write_text(text)
    out.write_bytes(_content(modules) + cpio(folder))
    remove_tree(folder)


def _content(layer: Layer) -> bytes:
    # Not what follows in the blobs of a trust domain.
    return layer.path.read_bytes()[: layer.size]


def _config(boot: Boot) -> dict[str, str]:
    files = {
        "modules": "".join(f"{name}\n" for name in boot.modules),
        "segments": "".join(map(_line, boot.mounts)),
        "hostname": boot.hostname + "\n",
        "network": boot.network + "\n",
    }
    if boot.command is not None:
        files["run"] = boot.command
    return files


def _line(mount: Mount) -> str:
    mode = "rw" if mount.writable else "ro"
    where = (mount.fstype or "-", mount.mountpoint or "-")
    return " ".join((f"{mount.slot:02x}", mount.segment, mount.name, mode, *where)) + "\n"


def files() -> Traversable:
    """The folder images/files/."""
    return resources.files("onecopy.images").joinpath("files")


def resource(name: str) -> bytes:
    """A file of images/files/: what onecopy runs inside guests."""
    return files().joinpath(name).read_bytes()
