"""Which pages of blobs guests have touched, by the page tables of their VMMs.

The page cache tells too much: a touched page of a mapping makes the kernel read as much around it
as the disk's read-ahead, and what was just built is there as a whole. Page tables also have what
the kernel maps along with a touched page, if it is in memory: 64 KiB, or one large folio. Not here:
how it is remembered (access_record.py).
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
    """What the guests that hold an artifact have mapped now, looked up once for all its blobs.

    Raises NotPermitted without ptrace rights over their VMMs.
    """

    def __init__(self, host: Runtime, artifact: Artifact) -> None:
        self._maps = list(_maps(host, artifact))

    def pages(self, layer: Layer) -> bytes | None:
        """One byte per page of a blob, 1 if a guest has it; None if no guest maps the blob."""
        pages, found = bytearray(-(-layer.blob_size // PAGE_SIZE)), False
        # By inode: a blob may have a link of its own for a guest. Not by device: file systems with
        # subvolumes tell two of them.
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
        # What nobody can read of one says nothing of the others.
        with contextlib.suppress(NotFound, Unreadable):
            yield pid, smaps.read(pid)


def _mark(pages: bytearray, pid: int, mapping: smaps.Mapping) -> None:
    first = mapping.offset // PAGE_SIZE
    # A VMM can map more than the file has.
    count = min(mapping.size // PAGE_SIZE, max(len(pages) - first, 0))
    for page, entry in enumerate(pagemap.read(pid, mapping.start, count), start=first):
        if page < len(pages) and (pagemap.present(entry) or pagemap.swapped(entry)):
            pages[page] = 1
