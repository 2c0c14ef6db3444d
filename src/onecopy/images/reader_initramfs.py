"""Makes the initramfs of a reader guest from trusted parts, anew for each reader.

Kernel, boot modules and busybox are the same as in other guests. tar, blkid and partx are this
host's, with their libraries. Not here: the reader's program (files/reader).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from onecopy.images.initramfs import cpio, resource
from onecopy.images.kernel import KernelConfig, boot_image, ensure_kernel
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
    """Collect the parts of a reader guest, and write its initramfs.

    Args:
        store: Holds kernel and tools; missing ones are fetched.
        work: The directory for the initramfs.
        progress: Called with one line of text for each step.

    Raises:
        BadSource: Kernel or tools cannot be fetched.
        MissingProgram, Incompatible: This host cannot run a reader.
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
        kernel=boot_image(kernel, accel.name),
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
        _copy_program(find_program(program), folder / "tools")
    out.write_bytes(_content(modules) + cpio(folder))
    # QEMU opens the file itself, as another user.
    out.chmod(0o644)
    shutil.rmtree(folder)


def _copy_program(program: str, into: Path) -> None:
    """Copy a program of this host and its libraries."""
    shutil.copy(program, into)
    for library in _LIBRARY.findall(run([Path("/") / _LOADER, "--list", program])):
        shutil.copy(library, into)


def _content(layer: Layer) -> bytes:
    # A blob of a trust domain has padding after its content.
    return layer.path.read_bytes()[: layer.size]
