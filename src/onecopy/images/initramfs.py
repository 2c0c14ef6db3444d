"""Writes the initramfs of a booted guest.

The initramfs is two concatenated cpio archives. The first holds the kernel's boot modules and lies
in the store with the kernel. The second holds busybox, the first stage (files/init) and this
guest's configuration.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from onecopy.linux.removal import remove_tree
from onecopy.store.artifact import Layer
from onecopy.subprocesses import run

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

TOOLS_MOUNTPOINT = "/run/onecopy/tools"


class Mount(msgspec.Struct, frozen=True):
    """A range of a segment, as the guest's first stage mounts it."""

    slot: int
    """PCI slot of its virtio-pmem device."""
    fstype: str
    """File system; "" for none."""
    mountpoint: str
    """Mount point; "" to leave the range unmounted."""
    segment: str
    """Name of its segment."""
    name: str
    """Name of the link to its device, /dev/onecopy/NAME."""
    writable: bool = False


class Boot(msgspec.Struct, frozen=True):
    """The configuration of a booted guest."""

    hostname: str
    mounts: Sequence[Mount]
    modules: Sequence[str]
    """File names in the boot module archive, in loading order."""
    network: str
    """Address, gateway and name servers, or "dhcp"; "-" for no network (guest/network.py)."""
    command: str | None
    """A command to run under a minimal init; "" to run none; None to start the image's init."""


def cpio(folder: Path) -> bytes:
    """Pack the directory as an initramfs archive; the same content gives the same bytes."""
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
    """Write the initramfs for ``boot`` to ``out``.

    Args:
        out: The file to write.
        boot: The guest's configuration.
        modules: The boot module archive.
        busybox: The busybox program.
    """
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
    # A blob of a trust domain has padding after its content.
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
    """Return the directory images/files."""
    from importlib import resources  # a clone needs no file of it

    return resources.files("onecopy.images").joinpath("files")


def resource(name: str) -> bytes:
    """Read a file of images/files, which holds the programs that onecopy runs in guests."""
    return files().joinpath(name).read_bytes()
