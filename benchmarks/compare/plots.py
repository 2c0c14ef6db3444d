"""Draws the results with matplotlib, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare.run import Outcome
from benchmarks.compare.tables import LABELS, groups, title
from onecopy.model import MIB

_COLOURS = {
    "none": "#444444",
    "ksm": "#b07aa1",
    "xip": "#f28e2b",
    "template": "#4e79a7",
    "saved+xip": "#59a14f",
    "all": "#e15759",
}


def plot_all(found: Sequence[Outcome], out: Path) -> None:
    """Write memory-KIND-N and bars-KIND-N; KIND is ``alike`` or ``different``, N the guests."""
    # Make the files reproducible.
    mpl.rcParams["svg.hashsalt"] = "onecopy"
    for same in groups(found):
        kind = f"{'alike' if same[0].alike else 'different'}-{same[0].guests}"
        _write(_memory(same), out / f"memory-{kind}")
        _write(_bars(same), out / f"bars-{kind}")


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110)


def _memory(found: Sequence[Outcome]) -> Figure:
    """Draw the host's memory over time, one line for each way."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes: Axes = figure.subplots()
    for each in found:
        line = each.timeline
        colour = _COLOURS[each.way]
        axes.plot(line.seconds, _mib(line.used), color=colour, label=LABELS[each.way])
        for what, sign in (("all answer", "o"), ("idle", "s")):
            moment = line.marks[what]
            used = next((u for s, u in zip(line.seconds, line.used, strict=True) if s >= moment), 0)
            axes.plot([moment], [used / MIB], sign, color=colour)
    axes.set_xlabel("seconds (circle: all guests answer, square: idle; then they work)")
    axes.set_ylabel("host memory in use, page cache included, MiB")
    axes.set_title(title(found))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _mib(values: Sequence[int]) -> list[float]:
    return [value / MIB for value in values]


def _bars(found: Sequence[Outcome]) -> Figure:
    """Draw memory, start time and CPU time, one bar for each way."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    memory, start, cpu = figure.subplots(1, 3)
    _bar(memory, found, "host memory per guest, MiB", lambda o: o.idle_memory / MIB / o.guests)
    _bar(start, found, "start until it answers, s", lambda o: o.seconds.median)
    _bar(cpu, found, "CPU in all per guest, s", lambda o: (o.vmm_cpu + o.ksm_cpu) / o.guests)
    figure.suptitle(title(found))
    return figure


def _bar(
    axes: Axes, found: Sequence[Outcome], title: str, value: Callable[[Outcome], float]
) -> None:
    names = [LABELS[each.way] for each in found]
    values = [value(each) for each in found]
    drawn = axes.barh(names, values, color=[_COLOURS[each.way] for each in found])
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.margins(x=0.3)
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()
    if title != "host memory per guest, MiB":
        axes.set_yticklabels([])
