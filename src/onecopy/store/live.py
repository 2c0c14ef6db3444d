"""What the host writes to and guests read: the live content of SC ranges.

``ROOT/live/HEX.N`` belongs to range N of the segment whose manifest is HEX. It starts as the stored
content and goes when nothing names or holds the segment any more. Not here: writing to it
(guest/segments/live_write.py).
"""

from __future__ import annotations

from pathlib import Path

from onecopy.linux.sparse import copy_file
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout
from onecopy.store.leftovers import going_on


def path_of(layout: Layout, segment: str, number: int) -> Path:
    """Where the live content of a range lies, if it was ever used."""
    return layout.live / f"{segment.removeprefix('sha256:')}.{number}"


def ensure(layout: Layout, segment: str, number: int, content: Path, size: int) -> Path:
    """The live content of a range, made from ``content`` if need be; no lock is held.

    Raises InsufficientResources, NotPermitted.
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


def sweep(layout: Layout, wanted: set[str]) -> None:
    """Remove what belongs to segments that are not ``wanted`` (digests); the lock is held."""
    for path in layout.live.iterdir():
        if f"sha256:{path.name.partition('.')[0]}" not in wanted:
            with going_on(path):
                path.unlink(missing_ok=True)
