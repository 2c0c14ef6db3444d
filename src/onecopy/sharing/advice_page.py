"""The advice as one HTML page with diagrams: no scripts, no other files, printable.

Not here: the figures (``advice``).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from string import Template

from onecopy.model import format_size
from onecopy.printable import printable
from onecopy.sharing.advice import KINDS, WAYS, Looked
from onecopy.sharing.survey import Survey

#: One colour per kind, which people with colour vision deficiency can distinguish (Okabe and Ito).
_COLOURS = ("#999999", "#0072b2", "#56b4e9", "#e69f00", "#d55e00")
_SHARED, _MERGED, _FREE = "#009e73", "#cc79a7", "#f0f0f0"
_WIDTH, _BAR, _LABEL, _FIGURE = 900, 26, 170, 110

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>onecopy advise</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto } .take { font-size: 1.2em }
svg { width: 100%; height: auto } svg text { font: 14px sans-serif; fill: #222 }
.key span { display: inline-block; margin-right: 1.2em }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .4em }
</style></head><body>
<h1>What these guests can share</h1>
<p class="take">Take: <b>$take</b>.</p>
<p>$reason.</p>
$steps
<h2>What each way would save</h2>
<p>The most memory that the host would get back. Dark: the part that no other way saves.</p>
$ways
<table><tr><th>Way</th><th>Saves</th><th>Alone</th><th>Description</th></tr>$way_rows</table>
<h2>Overlaps</h2>
<table><tr><th>Saved by</th><th></th></tr>$overlaps</table>
<h2>Kinds of guest memory</h2>
<p>The guests' own memory, $own, compared page by page.</p>
$kinds
<h2>The guests</h2>
$guests
<p class="key">$key</p>
$left_out
$files
</body></html>
""")


def escape(text: str) -> str:
    """Escape untrusted text for HTML, control characters included."""
    return html.escape(printable(text))


def page(survey: Survey, steps: Sequence[tuple[str, str]]) -> str:
    """Render the page.

    Args:
        steps: commands, each with its purpose.
    """
    advice = survey.advice
    return _PAGE.substitute(
        take=escape(" and ".join(advice.take) or "nothing"),
        reason=escape(advice.reason),
        steps=_steps(steps),
        ways=_bars(
            (way.name, [(way.alone, "#0072b2"), (way.saves - way.alone, "#9cc9e5")], way.saves)
            for way in advice.ways
        ),
        way_rows=_rows((w.name, w.saves, w.alone, WAYS[w.name]) for w in advice.ways),
        overlaps=_rows(
            (" + ".join(key.split("+")), size)
            for key, size in sorted(advice.overlaps.items(), key=lambda item: -item[1])
        ),
        own=format_size(advice.own),
        kinds=_bars(
            (name, [(size, colour)], size)
            for (name, size), colour in zip(advice.kinds.items(), _COLOURS, strict=True)
        )
        + "<ul>"
        + "".join(f"<li><b>{name}</b>: {escape(KINDS[name])}</li>" for name in advice.kinds)
        + "</ul>",
        guests=_bars(map(_guest, advice.guests)),
        key=_key({"own": "#d55e00", "shared": _SHARED, "merged by KSM": _MERGED, "unused": _FREE}),
        left_out="".join(
            f"<p>{escape(each.name)} was left out: {escape(each.reason)}.</p>"
            for each in survey.left_out
        )
        + "".join(f"<p>{escape(n)}.</p>" for n in sorted({g.note for g in advice.guests}) if n),
        files="<h2>Files with the most copies</h2><table><tr><th>File</th><th>Copies</th>"
        "<th>Guests</th></tr>"
        + _rows((each.name, each.copies, str(each.guests)) for each in advice.files)
        + "</table>"
        if advice.files
        else "",
    )


def _guest(guest: Looked) -> tuple[str, list[tuple[int, str]], int]:
    parts = [(guest.own, "#d55e00"), (guest.shared, _SHARED), (guest.merged or 0, _MERGED)]
    rest = max(guest.ram_size - sum(size for size, _ in parts), 0)
    return guest.name, [*parts, (rest, _FREE)], guest.own


def _bars(bars: Iterable[tuple[str, Sequence[tuple[int, str]], int]]) -> str:
    """Draw bars to a common scale, each with a name, parts of (bytes, colour), and a figure."""
    known = list(bars)
    largest = max([sum(size for size, _ in parts) for _, parts, _ in known], default=0) or 1
    room = _WIDTH - _LABEL - _FIGURE
    lines = []
    for number, (name, parts, figure) in enumerate(known):
        top, left = number * _BAR, float(_LABEL)
        lines.append(f'<text x="0" y="{top + 17}">{escape(name[:22])}</text>')
        for size, colour in parts:
            width = size / largest * room
            lines.append(
                f'<rect x="{left:.1f}" y="{top + 3}" width="{width:.1f}" height="{_BAR - 8}" '
                f'fill="{colour}"/>'
            )
            left += width
        lines.append(f'<text x="{left + 6:.1f}" y="{top + 17}">{format_size(figure)}</text>')
    height = len(known) * _BAR
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(lines)}</svg>'


def _rows(rows: Iterable[Sequence[str | int]]) -> str:
    """Render table rows; numbers are bytes."""

    def cell(value: str | int) -> str:
        if isinstance(value, int):
            return f'<td class="n">{format_size(value)}</td>'
        return f"<td>{escape(value)}</td>"

    return "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)


def _key(colours: dict[str, str]) -> str:
    return "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in colours.items()
    )


def _steps(steps: Sequence[tuple[str, str]]) -> str:
    lines = [f"{escape(command)}    # {escape(why)}" for command, why in steps]
    return "<pre>" + "\n".join(lines) + "</pre>" if lines else ""
