"""The programs that decompress files, by the beginning of a file."""

from __future__ import annotations

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def decompressor(start: bytes) -> str:
    """Return the program for a file that begins with ``start``; "" if none is known."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")
