"""What a reader boots with: its initramfs, made anew for each from what is trusted.

Kernel, boot modules and busybox are those of all guests; tar, blkid and partx are this host's, with
the libraries that they need. Not here: what the first stage does (files/reader).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from onecopy.images.initramfs import cpio, resource
from onecopy.images.kernel import KernelConfig, ensure_kernel
from onecopy.images.tools import ensure_tools
from onecopy.store import Store
from onecopy.store.artifact import Layer
from onecopy.subprocesses import find_program, run
from onecopy.vmm.accel import Choice, choose
from onecopy.vmm.qemu import probe
from onecopy.vmm.reader_vm import Parts

_PROGRAMS = ("tar", "blkid", "partx")
_LOADER = Path("lib64/ld-linux-x86-64.so.2")
_LIBRARY = re.compile(r"^\s*\S+ => (/\S+) ", re.MULTILINE)


def reader_parts(store: Store, work: Path, progress: Callable[[str], None]) -> Parts:
    """What a reader is made of: from the store, or fetched into it; its initramfs is in ``work``.

    Raises BadSource (no network to fetch from), MissingProgram, Incompatible.
    """
    kernel, tools = ensure_kernel(store, progress=progress), ensure_tools(store, progress)
    qemu = probe(store.cache)
    image = kernel.layer("kernel").path
    accel = choose(Choice.AUTO, qemu.binary, image, store.cache)
    initrd = work / "reader"
    modules = KernelConfig.of(kernel).modules
    _write_initrd(initrd, modules, kernel.layer("boot-modules"), tools.layer("busybox"))
    return Parts(
        qemu=qemu,
        accel=accel.name,
        kernel=image,
        initrd=initrd,
        modules=kernel.layer("modules").path,
    )


def _write_initrd(out: Path, names: tuple[str, ...], modules: Layer, busybox: Layer) -> None:
    folder = out.with_name(out.name + ".d")
    for name in ("bin", "dev", "proc", "sys", "lib/modules", "lib64", "look", "onecopy", "tools"):
        (folder / name).mkdir(parents=True)
    (folder / "bin/busybox").write_bytes(_content(busybox))
    (folder / "init").write_bytes(resource("reader"))
    for path in (folder / "bin/busybox", folder / "init"):
        path.chmod(0o755)
    (folder / "onecopy/modules").write_text("".join(f"{name}\n" for name in names))
    shutil.copy(Path("/") / _LOADER, folder / _LOADER)
    for program in _PROGRAMS:
        _take_along(find_program(program), folder / "tools")
    out.write_bytes(_content(modules) + cpio(folder))
    # QEMU, another user, opens it anew.
    out.chmod(0o644)
    shutil.rmtree(folder)


def _take_along(program: str, into: Path) -> None:
    """Copy a program of this host, with the libraries that it needs."""
    shutil.copy(program, into)
    for library in _LIBRARY.findall(run([Path("/") / _LOADER, "--list", program])):
        shutil.copy(library, into)


def _content(layer: Layer) -> bytes:
    # Not what follows in the blobs of a trust domain.
    return layer.path.read_bytes()[: layer.size]
