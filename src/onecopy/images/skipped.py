"""What of a source is left out, in a user's words: how much of each kind, and what first."""

from __future__ import annotations

import os

#: Kinds that are told by name.
_MOST = 8


class LeftOut:
    """Kinds of things that are left out, as they are found."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, bytes]] = {}

    def add(self, kind: str, name: bytes) -> None:
        """Count one more thing of a ``kind``, which is ``name``."""
        if kind not in self._kinds and len(self._kinds) >= _MOST:
            kind = "other things"
        count, first = self._kinds.get(kind, (0, name))
        self._kinds[kind] = (count + 1, first)

    def lines(self) -> list[str]:
        """One text for each kind."""
        return [
            f"{kind} ({count}, first of {os.fsdecode(first[:200])!a})"
            for kind, (count, first) in self._kinds.items()
        ]
