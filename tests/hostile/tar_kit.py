"""Archives byte by byte, as no program would write them."""

from __future__ import annotations

import struct
from collections.abc import Iterable

END = bytes(1024)


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    target: bytes = b"",
    mtime: bytes = b"14000000000",
    mode: bytes = b"0000644",
    uid: bytes = b"0000000",
    devices: tuple[bytes, bytes] = (b"", b""),
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    sparse: bytes = b"",
) -> bytes:
    """A header with a right checksum; fields are written as they are."""
    length = size if isinstance(size, bytes) else b"%011o" % size
    fields = (name, mode, uid, b"0000000", length, mtime, b" " * 8, kind, target, magic)
    head = struct.pack("100s8s8s8s12s12s8sc100s8s", *fields)
    head += struct.pack("32s32s8s8s155s12x", b"root", b"root", *devices, prefix)
    if sparse:
        head = (head[:386] + sparse).ljust(512, b"\0")
    total = sum(head)
    return head[:148] + b"%06o\0 " % total + head[156:]


def filled(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def file(name: bytes, data: bytes = b"", **fields: bytes) -> bytes:
    return header(name, size=len(data), **fields) + filled(data)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    data = b"".join(record(*pair) for pair in records)
    return header(b"pax", kind, size=len(data)) + filled(data)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return header(b"././@LongLink", kind, size=len(name) + 1) + filled(name + b"\0")


def nested(depth: int) -> Iterable[bytes]:
    for level in range(1, depth + 1):
        name = b"d/" * level
        yield (long_name(name) if len(name) > 99 else b"") + header(name[:99], b"5")


def sparse_entries(*pairs: tuple[int, int], more: bool = False, real: int) -> bytes:
    """What GNU's old format has of a map in a header."""
    data = b"".join(b"%011o\0%011o\0" % pair for pair in pairs).ljust(96, b"\0")
    return data + (b"\1" if more else b"\0") + b"%011o\0" % real
