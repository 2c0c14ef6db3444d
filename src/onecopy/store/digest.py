"""The digest of a file, without reading its holes.

A hole reads as zeroes, but reading it fills the host's page cache with them. Not here: digests of
what is in memory already (oci.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20
_ZEROES = bytes(_CHUNK)


def file_digest(path: Path) -> str:
    """``sha256:HEX`` of the content of ``path``; raise OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        size, position = os.fstat(fd).st_size, 0
        for start, end in (*_data(fd, size), (size, size)):
            for at in range(position, start, _CHUNK):
                digest.update(_ZEROES[: start - at])
            for at in range(start, end, _CHUNK):
                digest.update(os.pread(fd, min(_CHUNK, end - at), at))
            position = end
    return f"sha256:{digest.hexdigest()}"


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each range that is no hole (lseek(2), SEEK_DATA)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
