"""The record of a segment: its ranges and their source.

A segment has one or more ranges, each with a page class. Each range with stored content has a
layer. Not here: how a range is mapped (guest/backing.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from onecopy.errors import InvalidInput, StoreDamaged
from onecopy.model import HUGE_PAGE_SIZE, PageClass, align_up, format_size
from onecopy.store.artifact import Artifact, Layer, decode_config

#: Media type of an image layer, without its file system's name.
MEDIA_TYPE = "application/vnd.onecopy.image.v1"
#: A guest has no slots for more.
MAX_RANGES = 31


class Range(msgspec.Struct, frozen=True, rename={"page_class": "class"}):
    """A range of a segment."""

    page_class: PageClass
    size: int
    """Bytes; a multiple of 2 MiB."""
    fs: str = ""
    """``erofs``, ``ext2`` or ``ext4``; "" for plain data."""


class SegmentConfig(msgspec.Struct, frozen=True):
    """Config record of a segment; the fields are those of docs/json.md."""

    ranges: tuple[Range, ...] = ()
    source: str = ""
    include: tuple[str, ...] = ()
    init: str | None = None
    parent: str = ""
    """Digest of the segment that a guest committed changes to; "" for a segment not committed."""
    schema: int = 2

    @classmethod
    def of(cls, artifact: Artifact) -> SegmentConfig:
        """Read the record of a segment.

        Raises:
            StoreDamaged: The record is malformed.
        """
        config = decode_config(artifact, cls, "then build it again")
        ranges = config.ranges or _single_range(artifact)
        try:
            check(ranges)
        except InvalidInput as error:
            raise StoreDamaged(
                f"the record of {artifact.ref} is invalid: {error}",
                hint=f"run `onecopy rm {artifact.ref}`, then build it again",
            ) from error
        return msgspec.structs.replace(config, ranges=ranges)

    def encode(self) -> bytes:
        """Encode the record as it is stored."""
        return msgspec.json.encode(self, order="deterministic")


def role(number: int) -> str:
    """Return the role of the layer with the content of range ``number``."""
    return f"range{number}" if number else "image"


def layer_of(artifact: Artifact, number: int, item: Range) -> Layer | None:
    """Return the layer with the content of a range; None for a class without stored content.

    Raises:
        StoreDamaged: The layer is missing.
    """
    return artifact.layer(role(number)) if item.page_class.saved else None


def _single_range(artifact: Artifact) -> tuple[Range, ...]:
    """Return the one range of a record of schema 1, which has no list of ranges."""
    layer = artifact.layer(role(0))
    return (Range(PageClass.SR, layer.size, layer.media_type.rpartition("+")[2]),)


def check(ranges: Sequence[Range]) -> None:
    """Raise InvalidInput unless ``ranges`` make a valid segment."""
    if not ranges:
        raise InvalidInput(
            "a segment needs at least one range", hint="give --range CLASS:SIZE[:FILE]"
        )
    if len(ranges) > MAX_RANGES:
        raise InvalidInput(
            f"the segment has {len(ranges)} ranges; the limit is {MAX_RANGES}",
            hint="split it into several segments",
        )
    for number, item in enumerate(ranges):
        _check_one(f"range {number} ({item.page_class})", item)


def _check_one(what: str, item: Range) -> None:
    if item.size <= 0:
        raise InvalidInput(f"{what} is empty", hint="give a size, for example 2M")
    if item.size % HUGE_PAGE_SIZE:
        fits = format_size(align_up(item.size))
        raise InvalidInput(
            f"{what} has {item.size} bytes, which is not a multiple of 2 MiB",
            hint=f"use the next aligned size: {fits}",
        )
    if item.fs and not item.page_class.saved:
        raise InvalidInput(
            f"{what} has no stored content and cannot hold a file system",
            hint="use class SW or EW, or make the file system in the guest",
        )
    if item.fs == "erofs" and item.page_class.writable:
        raise InvalidInput(
            f"{what} is writable, but EROFS is read-only",
            hint="use ext2, or class SR or ER",
        )
    if item.fs and item.page_class is PageClass.SW:
        raise InvalidInput(
            f"{what} holds a file system, which guests that write to one copy would corrupt",
            hint="use class EW, which gives each guest its own copy",
        )
