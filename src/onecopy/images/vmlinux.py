"""Unpacks the kernel of a bzImage, which QEMU can boot by its PVH entry point.

A bzImage unpacks itself in the guest. Under TCG that is a quarter of the kernel's boot. The
unpacked kernel skips it, and with it the randomisation of the kernel's addresses.

Source:
    Linux Documentation/arch/x86/boot.rst (The Real-Mode Kernel Header) and
    arch/x86/platform/pvh; QEMU docs/system/target-i386 (-kernel); xen/include/public/elfnote.h.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from onecopy.errors import CommandFailed, MissingProgram
from onecopy.images.decompressors import decompressor
from onecopy.linux import memfd
from onecopy.vmm.confined_tool import Limits, Task, run_tool

#: The boot protocol that has the fields below: 2.08.
_PROTOCOL = 0x208
#: Bytes up to their end, and bytes of an ELF header.
_HEADER, _ELF = 0x250, 64
#: An ELF note of Xen's with the address of the PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY, 18).
_ENTRIES = tuple(struct.pack("<III", 4, size, 18) + b"Xen\0" for size in (4, 8))
#: Bytes of a kernel, and seconds to unpack it.
_MOST, _SECONDS = 1 << 29, 120.0


def unpack(image: Path, out: Path) -> bool:
    """Write the kernel of a bzImage to ``out``.

    Returns:
        False if it is no bzImage that can be unpacked, or its kernel has no PVH entry point. Then
        ``out`` does not exist.
    """
    with image.open("rb") as file:
        payload = _payload(file.read(_MOST))
    program = decompressor(payload)
    if not program:
        return False
    # All but gzip's have 4 bytes behind them: the size.
    content = payload if program == "gzip" else payload[:-4]
    with out.open("xb+") as file:
        if _unpacked(program, content, file.fileno()) and _bootable(out):
            return True
    out.unlink()
    return False


def _payload(image: bytes) -> bytes:
    """Return the compressed kernel of a bzImage; b"" if there is none."""
    if len(image) < _HEADER or image[0x202:0x206] != b"HdrS":
        return b""
    if struct.unpack_from("<H", image, 0x206)[0] < _PROTOCOL:
        return b""
    start, size = struct.unpack_from("<II", image, 0x248)
    # 0 stands for 4 sectors.
    start += 512 * ((image[0x1F1] or 4) + 1)
    return image[start : start + size]


def _unpacked(program: str, content: bytes, out: int) -> bool:
    packed = memfd.create_sealed("onecopy-bzimage", content)
    try:
        os.lseek(packed, 0, os.SEEK_SET)
        limits = Limits(seconds=_SECONDS, processes=16, file_size=_MOST)
        run_tool(Task([program, "-dc"], stdin=packed, stdout=out, limits=limits))
    except (CommandFailed, MissingProgram):
        return False
    finally:
        os.close(packed)
    return True


def _bootable(path: Path) -> bool:
    """Whether an ELF file of x86-64 has a PVH entry point; drop what follows the ELF file."""
    content = path.read_bytes()
    if len(content) < _ELF or content[:6] != b"\x7fELF\x02\x01":
        return False
    if not any(entry in content for entry in _ENTRIES):
        return False
    (sections,) = struct.unpack_from("<Q", content, 0x28)
    size, count = struct.unpack_from("<HH", content, 0x3A)
    # The section headers come last. The relocations behind them are for the bzImage's own loader.
    if 0 < sections + size * count < len(content):
        os.truncate(path, sections + size * count)
    return True
