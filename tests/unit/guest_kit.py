"""Records of guests, for tests that need none to run."""

from typing import Any

from onecopy.guest.run_directory import GuestRecord


def record(name: str, **changes: Any) -> GuestRecord:
    """The record of a clone; ``changes`` are other fields."""
    fields: dict[str, Any] = {
        "kind": "clone",
        "source": "s:latest",
        "digest": "sha256:0",
        "accel": "tcg",
        "accel_reason": "asked for",
        "pid": 1,
        "start_ticks": 1,
        "started": 0.5,
        "start_seconds": 0.5,
        "memory": 1,
        "ram_path": None,
    }
    return GuestRecord(name=name, **fields | changes)
