"""Digests of files, computed without reading their holes.

A hole reads as zeroes, but reading it would fill the host's page cache with them.

Not here: digests of data in memory (oci.py).
"""

from __future__ import annotations

import os
from pathlib import Path

from onecopy.linux.sparse import data_ranges

_CHUNK = 1 << 20
_ZEROES = bytes(_CHUNK)


def file_digest(path: Path) -> str:
    """Return ``sha256:HEX`` of a file's content.

    Raises:
        OSError: the file cannot be read.
    """
    import hashlib  # few commands check a digest, and it loads OpenSSL

    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        size, position = os.fstat(fd).st_size, 0
        for start, end in (*data_ranges(fd, size), (size, size)):
            for at in range(position, start, _CHUNK):
                digest.update(_ZEROES[: start - at])
            for at in range(start, end, _CHUNK):
                digest.update(os.pread(fd, min(_CHUNK, end - at), at))
            position = end
    return f"sha256:{digest.hexdigest()}"
