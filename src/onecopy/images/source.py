"""Where a segment's content comes from, as typed: ``debian:SUITE``, ``dir:PATH``, ``tar:PATH``,
``disk:FILE[#PARTITION]``.

Not here: how each is read (images/sources).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from onecopy.errors import InvalidInput, NotPermitted
from onecopy.images.sources.debian import open_debian
from onecopy.images.sources.directory import open_folder
from onecopy.images.sources.disk import open_disk
from onecopy.images.sources.tar import open_archive
from onecopy.store import Store


class Source(Protocol):
    """Something that a segment can be built from."""

    @property
    def label(self) -> str:
        """What the segment's record says: the kind and, for Debian, the suite; no host paths."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """What of it was not unpacked, once it is, in a user's words."""
        ...

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Return the tree to image: ``into`` (an empty folder), now filled, or one in place.

        Raises BadSource, NotPermitted, InsufficientResources, MissingProgram.
        """
        ...


def open_source(text: str, include: Sequence[str] = (), *, store: Store | None = None) -> Source:
    """The source that ``text`` means; ``include`` are Debian packages.

    What it takes to read one comes from ``store`` (default: this user's).

    Raises InvalidInput (not of a known form), BadSource (not there, not readable), NotPermitted.
    """
    kind, _, rest = text.partition(":")
    if kind not in ("debian", "dir", "tar", "disk") or not rest:
        raise InvalidInput(
            f"{text!r} is not a source",
            hint="write debian:SUITE, dir:PATH, tar:PATH, disk:FILE or kernel:FILE",
        )
    if kind == "debian":
        return open_debian(rest, include)
    if include:
        raise InvalidInput(
            f"packages cannot be added to {kind}:", hint="--include goes with --from debian:SUITE"
        )
    if kind == "dir":
        return open_folder(rest)
    if os.geteuid() != 0:
        raise NotPermitted(
            f"{kind}: can be built by root only, because it sets owners",
            hint="run as root, or unpack it yourself and build from dir:PATH",
        )
    return open_disk(rest, store or Store()) if kind == "disk" else open_archive(rest)
