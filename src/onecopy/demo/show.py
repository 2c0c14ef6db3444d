"""Formats the demo's result as a table, as JSON, and as an SVG image."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from html import escape
from typing import Any

from onecopy.demo.measure import Measured
from onecopy.model import MIB

HEADINGS = (
    "GUESTS",
    "HOW MANY",
    "UNTIL ALL ANSWER",
    "PER GUEST",
    "HOST MEMORY PER GUEST",
    "OF IT PRIVATE RAM",
)
NOTES = (
    "UNTIL ALL ANSWER: time from the first start until every guest's HTTP service has answered "
    "with its own name. PER GUEST: that time divided by the number of guests.",
    "HOST MEMORY PER GUEST: Pss of all QEMU processes (shared pages count once) and their page "
    "tables, divided by the number of guests.",
    "PRIVATE RAM: RAM of a guest that no other guest shares.",
)


def rows(batches: Sequence[Measured]) -> list[list[str]]:
    """Return one row for each kind of guest."""
    return [
        [
            batch.kind,
            str(batch.guests),
            f"{batch.seconds:.2f} s",
            f"{batch.per_guest:.3f} s",
            f"{batch.host / MIB:.1f} MiB",
            f"{batch.ram_private / MIB:.2f} MiB",
        ]
        for batch in batches
    ]


def as_json(accel: str, batches: Sequence[Measured]) -> dict[str, Any]:
    """Return the fields of docs/json.md; times in seconds, sizes in bytes."""
    booted, cloned = batches
    return {
        "guests": cloned.guests,
        "answered": cloned.answered,
        "accel": accel.partition(":")[0],
        "accel_reason": accel.partition(": ")[2],
        "speedup": booted.per_guest / cloned.per_guest,
        "private_ram_bytes_per_guest": cloned.ram_private,
        "host_bytes_per_guest": cloned.host,
        "booted_guests": booted.guests,
        "booted_answered": booted.answered,
        "booted_private_ram_bytes_per_guest": booted.ram_private,
        "booted_host_bytes_per_guest": booted.host,
        "seconds_until_all_answer": cloned.seconds,
        "booted_seconds_until_all_answer": booted.seconds,
        "cores": os.cpu_count(),
        "host_kernel": platform.release(),
    }


def picture(accel: str, batches: Sequence[Measured]) -> str:
    """Draw three pairs of bars as an SVG document."""
    booted, cloned = batches
    panels = [
        ("Until the application answers, per guest", "s", booted.per_guest, cloned.per_guest, 3),
        ("Host memory per guest", "MiB", booted.host / MIB, cloned.host / MIB, 1),
        ("Private RAM per guest", "MiB", booted.ram_private / MIB, cloned.ram_private / MIB, 2),
    ]
    body = "".join(_panel(number, *panel) for number, panel in enumerate(panels))
    title = f"onecopy: {cloned.guests} clones of one saved system, {booted.guests} booted guests"
    note = f"{platform.machine()}, {os.cpu_count()} cores, under {accel.partition(':')[0].upper()}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif">'
        '<rect width="760" height="300" fill="white"/>'
        f'<text x="20" y="30" font-size="17" font-weight="bold">{escape(title)}</text>'
        f'{body}<text x="20" y="288" font-size="10" fill="#666">{escape(note)}</text></svg>\n'
    )


def _panel(number: int, title: str, unit: str, booted: float, cloned: float, digits: int) -> str:
    top = 55 + number * 75
    style = 'font-size="12"'
    parts = [f'<text x="20" y="{top}" font-size="13">{title}</text>']
    largest = max(booted, cloned) or 1
    for line, (name, value, color) in enumerate(
        (("booted", booted, "#b0b7c3"), ("cloned", cloned, "#2463eb"))
    ):
        y = top + 8 + line * 24
        width = max(500 * value / largest, 1)
        parts.append(
            f'<text x="20" y="{y + 15}" font-size="12" fill="#444">{name}</text>'
            f'<rect x="70" y="{y}" width="{width:.1f}" height="20" fill="{color}"/>'
            f'<text x="{76 + width:.1f}" y="{y + 15}" {style}>{value:.{digits}f} {unit}</text>'
        )
    return "".join(parts)
