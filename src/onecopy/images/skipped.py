"""Counts the items of a source that are skipped, by kind, for one line of output each."""

from __future__ import annotations

import os

#: The beginning of a line of progress about something that is left out. On a terminal such a line
#: stays, and the next one does not replace it (cli/output.py).
SKIPPED = "skipped: "
#: Kinds to list by name; the rest are counted together.
_MAX_KINDS = 8


class SkippedItems:
    """The skipped items of a source, counted by kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, bytes]] = {}

    def add(self, kind: str, name: bytes) -> None:
        """Count the item ``name`` of a ``kind``."""
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            kind = "other items"
        count, first = self._kinds.get(kind, (0, name))
        self._kinds[kind] = (count + 1, first)

    def lines(self) -> list[str]:
        """Return one text for each kind, with its count and its first item."""
        return [
            f"{kind} ({count}, first of {os.fsdecode(first[:200])!a})"
            for kind, (count, first) in self._kinds.items()
        ]
