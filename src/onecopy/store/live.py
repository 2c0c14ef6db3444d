"""Files that the host writes and guests read: the live content of SC ranges.

``ROOT/live/HEX.N`` belongs to range N of the segment with the manifest HEX. It starts with the
stored content. It is removed when the segment is neither named nor held.

Not here: writing to it (guest/segments/live_write.py).
"""

from __future__ import annotations

from pathlib import Path

from onecopy.linux.sparse import copy_file
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout
from onecopy.store.leftovers import tolerate_failure


def path_of(layout: Layout, segment: str, number: int) -> Path:
    """Return the path of a range's live content, whether or not it exists."""
    return layout.live / f"{segment.removeprefix('sha256:')}.{number}"


def ensure(layout: Layout, segment: str, number: int, content: Path, size: int) -> Path:
    """Return a range's live content, created from ``content`` if missing.

    The caller does not hold the store's lock.

    Raises:
        InsufficientResources: the disk is full.
        NotPermitted: this user may not change the store.
    """
    path = path_of(layout, segment, number)
    with file_errors(layout.root), layout.locked():
        if not path.exists():
            temp = layout.tmp / path.name
            temp.unlink(missing_ok=True)
            with content.open("rb") as file:
                copy_file(file.fileno(), size, temp)
            temp.chmod(0o644)
            temp.replace(path)
    return path


def sweep(layout: Layout, needed: set[str]) -> None:
    """Remove files of segments whose digest is not in ``needed``; the caller holds the lock."""
    for path in layout.live.iterdir():
        if f"sha256:{path.name.partition('.')[0]}" not in needed:
            with tolerate_failure(path):
                path.unlink(missing_ok=True)
