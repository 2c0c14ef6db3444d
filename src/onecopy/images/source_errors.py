"""One error for a source that cannot be opened, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onecopy.errors import BadSource


@contextmanager
def opening(what: str, text: str, hint: str) -> Iterator[None]:
    """Turn any error of the file system in the block into BadSource.

    Args:
        what: The kind of the source, for the message.
        text: The source as the user typed it.
        hint: The error's hint.

    Raises:
        BadSource: The block raised an OSError, or RuntimeError for a loop of symbolic links.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", error)
        raise BadSource(f"cannot open the {what} {text!r}: {why}", hint=hint) from error
