"""Creates a segment range by range: `onecopy create`.

Not here: segments built from a source (build.py).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import BadSource, InvalidInput
from onecopy.images.range_record import MEDIA_TYPE, Range, SegmentConfig, check, role
from onecopy.model import PageClass, Reference, format_size, parse_size
from onecopy.store import Access, Artifact, NewLayer, Store, require_disk
from onecopy.store.oci import ROLE
from onecopy.subprocesses import run

_EROFS, _EXT = 0xE0F5E1E2, 0xEF53
_HAS_JOURNAL, _EXTENTS = 0x4, 0x40


class NewRange(msgspec.Struct, frozen=True):
    """A range to create."""

    page_class: PageClass
    size: int
    """Bytes."""
    file: Path | None = None
    """The initial content; None for zeroes."""

    @classmethod
    def parse(cls, text: str) -> NewRange:
        """Parse ``CLASS:SIZE[:FILE]``.

        Raises:
            InvalidInput: The class or the size is malformed.
        """
        name, _, rest = text.partition(":")
        size, _, file = rest.partition(":")
        if name.upper() not in PageClass.__members__:
            raise InvalidInput(
                f"{name!r} is not a page class", hint=f"use one of {' '.join(PageClass)}"
            )
        return cls(PageClass(name.upper()), parse_size(size), Path(file) if file else None)


def create_segment(
    store: Store,
    ref: Reference,
    ranges: Sequence[NewRange],
    *,
    access: Access | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Create the segment ``ref`` from ``ranges``, atomically.

    Guests can mount a range whose file is an EROFS, ext2 or ext4 image.

    Args:
        store: The store to put the segment into.
        ref: The name and version to give.
        ranges: The ranges, in order.
        access: Access rights of a new name.
        progress: Called with one line of text for each step.

    Raises:
        InvalidInput: A range is malformed, or the ranges do not go together.
        BadSource: A file cannot be read or is larger than its range.
        InsufficientResources, NotPermitted: As their names say.
        OnecopyError: Any error of `Store.put`.
    """
    store.require_free("segment", ref, access)
    described = tuple(_describe(number, item) for number, item in enumerate(ranges))
    check(described)
    saved = [(n, item) for n, item in enumerate(ranges) if item.page_class.saved]
    require_disk(store.root, sum(_blocks(item.file) for _, item in saved if item.file))
    with store.workspace() as work:
        layers = []
        for number, item in saved:
            progress(f"storing range {number}: {format_size(item.size)}")
            path = work / role(number)
            _write(item, path)
            form = described[number].fs or "raw"
            layers.append(NewLayer(path, f"{MEDIA_TYPE}+{form}", {ROLE: role(number)}))
        config = SegmentConfig(ranges=described, source="ranges")
        return store.put("segment", ref, config.encode(), layers, access=access)


def _describe(number: int, item: NewRange) -> Range:
    if item.file is None:
        return Range(item.page_class, item.size)
    if not item.page_class.saved:
        raise InvalidInput(
            f"range {number} has class {item.page_class}, which has no stored content, and a file",
            hint="omit the file, or use class SW or EW",
        )
    if not item.file.is_file():
        raise BadSource(
            f"{item.file} is not a regular file", hint="give a regular file, or omit it for zeroes"
        )
    size = item.file.stat().st_size
    if size > item.size:
        raise BadSource(
            f"{item.file} has {size} bytes, but range {number} has only {item.size}",
            hint="make the range larger",
        )
    return Range(item.page_class, item.size, file_system(item.file))


def file_system(path: Path) -> str:
    """Return ``erofs``, ``ext2`` or ``ext4`` by the superblock's magic; "" for any other content.

    Raises:
        BadSource: The file cannot be read.

    Source: Linux Documentation/filesystems/ext4/super.rst; fs/erofs/erofs_fs.h.
    """
    try:
        with path.open("rb") as file:
            file.seek(1024)
            head = file.read(1024).ljust(1024, b"\0")
    except OSError as error:
        raise BadSource(
            f"cannot read {path}: {error.strerror}", hint="give a file that you may read"
        ) from error
    if struct.unpack_from("<I", head)[0] == _EROFS:
        return "erofs"
    if struct.unpack_from("<H", head, 56)[0] != _EXT:
        return ""
    compatible, incompatible = struct.unpack_from("<II", head, 92)
    return "ext4" if compatible & _HAS_JOURNAL or incompatible & _EXTENTS else "ext2"


def _blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def _write(item: NewRange, out: Path) -> None:
    """Write the content of a range as a sparse file."""
    if item.file:
        run(["cp", "--sparse=always", "--reflink=auto", "--no-preserve=all", item.file, out])
    else:
        out.touch()
    os.truncate(out, item.size)
