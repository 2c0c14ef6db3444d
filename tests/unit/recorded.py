"""The recorded /proc and /sys of a real host, and the kernel's own sums of its figures.

data/record.py records such trees.
"""

import re
from pathlib import Path

from onecopy.linux.counters import smaps

RECORDED = Path(__file__).parent / "data/6.18.44-fc-v669"
FIELDS = {
    "Rss": "rss",
    "Shared_Clean": "shared_clean",
    "Shared_Dirty": "shared_dirty",
    "Private_Clean": "private_clean",
    "Private_Dirty": "private_dirty",
    "Anonymous": "anonymous",
    "AnonHugePages": "anon_huge",
    "Swap": "swap",
    "KSM": "ksm",
}


def rollup(text: str) -> dict[str, int]:
    """The kernel's own sums, in bytes."""
    return {key: int(kib) << 10 for key, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.M)}


def check_against_rollup(mappings: list[smaps.Mapping], sums: dict[str, int]) -> None:
    for key, name in FIELDS.items():
        figures = [getattr(m, name) for m in mappings]
        if key in sums:
            assert sum(figures) == sums[key], key
        else:  # an older kernel: only KSM may be missing
            assert (key, set(figures)) == ("KSM", {None})
    # The kernel rounds Pss down to a KiB once per mapping in smaps, once in all in the rollup.
    pss = sum(m.pss for m in mappings)
    assert pss <= sums["Pss"] < pss + 1024 * len(mappings)
