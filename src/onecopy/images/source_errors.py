"""What a user typed as a source, and cannot be opened: one error for all kinds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onecopy.errors import BadSource


@contextmanager
def opening(what: str, text: str, hint: str) -> Iterator[None]:
    """Raise BadSource if ``text`` cannot be opened, for whatever reason of the file system's."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", error)
        raise BadSource(f"cannot open the {what} {text!r}: {why}", hint=hint) from error
