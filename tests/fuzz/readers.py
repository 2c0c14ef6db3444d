"""What reads foreign bytes, with samples of them: one function for each reader.

A reader gets an input and an empty folder in memory; it may leave things in that folder alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from onecopy.errors import OnecopyError

Read = Callable[[bytes, Path], object]


class Reader(NamedTuple):
    """One reader."""

    name: str
    read: Read
    samples: Sequence[bytes]
    errors: tuple[type[BaseException], ...] = ()
    """What it documents to raise, besides `OnecopyError`."""
    share: int = 10
    """Of all inputs, beside the other readers' shares: less for what is slow."""

    @property
    def expected(self) -> tuple[type[BaseException], ...]:
        """All that it may raise."""
        return (OnecopyError, *self.errors)


def text(data: bytes) -> str:
    """As Python has arguments and names of files."""
    return data.decode("utf-8", "surrogateescape")


def readers() -> dict[str, Reader]:
    """All readers by name."""
    from tests.fuzz import of_guests, of_images, of_processes, of_records, of_users

    parts = (of_users, of_guests, of_processes, of_records, of_images)
    found = [reader for part in parts for reader in part.readers()]
    return {reader.name: reader for reader in found}
