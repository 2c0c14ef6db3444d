"""Finds the pages of blobs that guests have accessed, in the page tables of their VMMs.

The page cache shows too many pages. For each accessed page the kernel also reads the disk's
read-ahead, and a blob that was just built is cached as a whole. Page tables are more precise: with
an accessed page the kernel maps cached pages around it, up to 64 KiB or one large folio. Not here:
records (access_record.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from onecopy.errors import NotFound, Unreadable
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import pagemap, smaps
from onecopy.model import PAGE_SIZE
from onecopy.store import Artifact, Layer


class Users:
    """The mappings of the guests that hold an artifact, read once for all its blobs.

    Raises:
        NotPermitted: This user has no ptrace access to their VMMs.
    """

    def __init__(self, host: Runtime, artifact: Artifact) -> None:
        self._maps = list(_maps(host, artifact))

    def pages(self, layer: Layer) -> bytes | None:
        """Return one byte per page of a blob, 1 if a guest has it; None if no guest maps it."""
        pages, found = bytearray(-(-layer.blob_size // PAGE_SIZE)), False
        # Compare inodes, because a guest may map a hard link of the blob. Do not compare devices,
        # because file systems with subvolumes report different numbers.
        inode = layer.path.stat().st_ino
        for pid, mappings in self._maps:
            for mapping in mappings:
                if mapping.inode == inode and mapping.path.startswith("/"):
                    with contextlib.suppress(NotFound, Unreadable):
                        _mark(pages, pid, mapping)
                        found = True
        return bytes(pages) if found else None


def _maps(host: Runtime, artifact: Artifact) -> Iterator[tuple[int, list[smaps.Mapping]]]:
    holders = {name for layer in artifact.layers for name in host.store.users(layer.digest)}
    for _, pid in host.vmms(holders):
        # A VMM that has ended or is unreadable does not affect the others.
        with contextlib.suppress(NotFound, Unreadable):
            yield pid, smaps.read(pid)


def _mark(pages: bytearray, pid: int, mapping: smaps.Mapping) -> None:
    first = mapping.offset // PAGE_SIZE
    # A mapping can be larger than the file.
    count = min(mapping.size // PAGE_SIZE, max(len(pages) - first, 0))
    for page, entry in enumerate(pagemap.read(pid, mapping.start, count), start=first):
        if page < len(pages) and (pagemap.present(entry) or pagemap.swapped(entry)):
            pages[page] = 1
