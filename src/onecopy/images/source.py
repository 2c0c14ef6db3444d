"""Opens a segment's source by its text: ``debian:``, ``dir:``, ``tar:`` or ``disk:``.

Not here: reading each kind (images/sources).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from onecopy.errors import InvalidInput, NotPermitted
from onecopy.images.sources.debian import open_debian
from onecopy.images.sources.directory import open_directory
from onecopy.images.sources.disk import open_disk
from onecopy.images.sources.tar import open_archive
from onecopy.store import Store


class Source(Protocol):
    """A source that a segment can be built from."""

    @property
    def label(self) -> str:
        """The kind, and Debian's suite, for the segment's record; never a path of this host."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """After `unpack`: one text for each kind of item that was skipped."""
        ...

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Unpack the source into the empty directory ``into``, if it is not a directory itself.

        Returns:
            The tree to image: ``into``, or the source's own directory.

        Raises:
            BadSource, NotPermitted, InsufficientResources, MissingProgram: As their names say.
        """
        ...


def open_source(text: str, include: Sequence[str] = (), *, store: Store | None = None) -> Source:
    """Open the source that ``text`` names.

    Args:
        text: ``debian:SUITE``, ``dir:PATH``, ``tar:PATH`` or ``disk:FILE[#PARTITION]``.
        include: Debian packages to install.
        store: Holds the kernel of the reader guest for ``disk:``; default: this user's store.

    Raises:
        InvalidInput: The text is malformed, or packages do not apply to the kind.
        BadSource: The source does not exist or cannot be read.
        NotPermitted: Only root can build from this kind.
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
            f"packages cannot be added to a {kind}: source",
            hint="omit --include, or use --from debian:SUITE",
        )
    if kind == "dir":
        return open_directory(rest)
    if os.geteuid() != 0:
        raise NotPermitted(
            f"only root can build from a {kind}: source, because unpacking sets owners",
            hint="unpack it yourself and build from dir:PATH, or run as root",
        )
    return open_disk(rest, store or Store()) if kind == "disk" else open_archive(rest)
