"""The record of a segment: what its ranges are, and what they were made from.

A segment is one or several ranges, each with a page class of its own; every range that has stored
content has a layer. Not here: how a range is mapped (guest/backing.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from onecopy.errors import InvalidInput, StoreDamaged
from onecopy.model import HUGE_PAGE_SIZE, PageClass, align_up, format_size
from onecopy.store.artifact import Artifact, Layer, decode_config

#: Media type of an image layer, without its file system's name.
MEDIA_TYPE = "application/vnd.onecopy.image.v1"
#: More than a guest has slots for would be of no use.
MAX_RANGES = 31


class Range(msgspec.Struct, frozen=True, rename={"page_class": "class"}):
    """One range of a segment."""

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
    """Digest of the segment that it was made from, in a guest; "" if it was not."""
    schema: int = 2

    @classmethod
    def of(cls, artifact: Artifact) -> SegmentConfig:
        """The record of a segment; raise StoreDamaged."""
        config = decode_config(artifact, cls, "then make it again")
        ranges = config.ranges or _whole(artifact)
        try:
            check(ranges)
        except InvalidInput as error:
            raise StoreDamaged(
                f"the record of {artifact.ref} cannot be read: {error}",
                hint=f"`onecopy rm {artifact.ref}`, then make it again",
            ) from error
        return msgspec.structs.replace(config, ranges=ranges)

    def encode(self) -> bytes:
        """As it is stored."""
        return msgspec.json.encode(self, order="deterministic")


def role(number: int) -> str:
    """The role of the layer that holds the content of range ``number``."""
    return f"range{number}" if number else "image"


def layer_of(artifact: Artifact, number: int, item: Range) -> Layer | None:
    """The content of a range; None for a class that has none. Raises StoreDamaged."""
    return artifact.layer(role(number)) if item.page_class.saved else None


def _whole(artifact: Artifact) -> tuple[Range, ...]:
    """What a segment is that was built before there were ranges."""
    layer = artifact.layer(role(0))
    return (Range(PageClass.SR, layer.size, layer.media_type.rpartition("+")[2]),)


def check(ranges: Sequence[Range]) -> None:
    """Raise InvalidInput for ranges that cannot be, one by one or together."""
    if not ranges:
        raise InvalidInput(
            "a segment has at least one range", hint="give --range CLASS:SIZE[:FILE]"
        )
    if len(ranges) > MAX_RANGES:
        raise InvalidInput(f"{len(ranges)} ranges are too many", hint=f"at most {MAX_RANGES} fit")
    for number, item in enumerate(ranges):
        _check_one(f"range {number} ({item.page_class})", item)


def _check_one(what: str, item: Range) -> None:
    if item.size <= 0:
        raise InvalidInput(f"{what} is empty", hint="give it a size, for example 2M")
    if item.size % HUGE_PAGE_SIZE:
        fits = format_size(align_up(item.size))
        raise InvalidInput(
            f"{what} has {item.size} bytes, which is no multiple of 2 MiB",
            hint=f"the next size that is aligned is {fits}",
        )
    if item.fs and not item.page_class.saved:
        raise InvalidInput(
            f"{what} is never saved, so it cannot hold a file system",
            hint="use SW or EW, or make the file system in the guest",
        )
    if item.fs == "erofs" and item.page_class.writable:
        raise InvalidInput(
            f"{what} is writable, but nothing can write to an EROFS",
            hint="use ext2, or one of the classes SR and ER",
        )
    if item.fs and item.page_class is PageClass.SW:
        raise InvalidInput(
            f"{what} holds a file system that several guests would write to at once, and destroy",
            hint="use EW, which each guest has for itself",
        )
