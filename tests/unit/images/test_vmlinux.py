"""The kernel of a bzImage: what is unpacked, and what is left to unpack itself."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from onecopy.images.vmlinux import unpack

_NOTE = struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)
_SECTIONS = 4096


def _elf(note: bytes = _NOTE, magic: bytes = b"\x7fELF\x02\x01") -> bytes:
    head = bytearray(_SECTIONS + 64)
    head[: len(magic)] = magic
    struct.pack_into("<Q", head, 0x28, _SECTIONS)
    struct.pack_into("<HH", head, 0x3A, 64, 1)
    head[0x100 : 0x100 + len(note)] = note
    return bytes(head)


def _bzimage(payload: bytes, *, protocol: int = 0x20F, offset: int = 0x300) -> bytes:
    head = bytearray(512 * 5)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    struct.pack_into("<II", head, 0x248, offset, len(payload))
    return bytes(head) + bytes(offset) + payload + b"behind it"


def _xz(content: bytes) -> bytes:
    return lzma.compress(content) + struct.pack("<I", len(content))


@pytest.mark.parametrize("pack", [gzip.compress, _xz])
def test_the_kernel_without_what_is_behind_it(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    image, out = tmp_path / "bzImage", tmp_path / "vmlinux"
    image.write_bytes(_bzimage(pack(_elf() + b"relocations")))
    assert unpack(image, out)
    assert out.read_bytes() == _elf()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        bytes(4096),
        _bzimage(gzip.compress(_elf()), protocol=0x207),
        _bzimage(gzip.compress(_elf()), offset=0)[:600],
        _bzimage(gzip.compress(_elf())[:-100] + b"damaged"),
        _bzimage(b"LZO? is not known"),
        _bzimage(gzip.compress(_elf(note=b""))),
        _bzimage(gzip.compress(_elf(magic=b"\x7fELF\x01\x01"))),
        _bzimage(gzip.compress(b"tiny")),
        struct.pack("<512s", b"").ljust(0x202, b"\0") + b"HdrS\xff\xff",
    ],
)
def test_what_has_to_unpack_itself(tmp_path: Path, content: bytes) -> None:
    image, out = tmp_path / "bzImage", tmp_path / "vmlinux"
    image.write_bytes(content)
    assert not unpack(image, out)
    assert not out.exists()
