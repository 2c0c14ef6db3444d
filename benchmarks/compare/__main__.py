"""`python -m benchmarks.compare`: runs all ways, prints Markdown, writes values and plots.

Not here: the ways (ways.py), the measurement (run.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.compare.mix import RUNS, Ware, alike, build_root, different, removed_at_end
from benchmarks.compare.run import Outcome, measure
from benchmarks.compare.tables import tables
from benchmarks.compare.templating import Templates
from benchmarks.compare.ways import WAYS
from benchmarks.report import machine_facts
from onecopy.errors import OnecopyError
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
from onecopy.vmm.accel import Choice


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/compare",
        description="Run the same guests (python, nginx, redis) without sharing, with KSM, with a "
        "segment, from a frozen guest, from a saved system, and with all of it.",
        epilog="The store is that of onecopy (ONECOPY_HOME); the root segment script-compare-root "
        "stays in it. KSM is the whole host's: it is switched on for a while, then as it was.",
    )
    parser.add_argument(
        "--guests", type=int, nargs="*", default=[8, 32], help="how many alike (default: 8 32)"
    )
    parser.add_argument(
        "--different", type=int, default=8, help="guests that have a root each (default: 8)"
    )
    names = [way.name for way in WAYS]
    parser.add_argument(
        "--ways", nargs="+", choices=names, default=names, help="in this order; default: all"
    )
    parser.add_argument("--accel", choices=list(Choice), default=Choice.AUTO, type=Choice)
    parser.add_argument(
        "--out", type=Path, default=Path("out/compare"), help="folder (default: out/compare)"
    )
    parser.add_argument(
        "--no-plots", dest="plots", action="store_false", help="and matplotlib is not needed"
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIRECTORY",
        help="the guests' root, with their packages (default: a Debian, which needs a mirror)",
    )
    parser.add_argument(
        "--ratios",
        action="store_true",
        help="show times relative to the first way's, as on a host whose time is not real",
    )
    arguments = parser.parse_args()
    if min(arguments.guests, default=4) < 4 or arguments.different in range(1, 3):
        parser.error("at least 4 guests that are alike, 3 that are different, or none")
    return arguments


def _tell(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


class _Results:
    """The results so far, written to ``out``."""

    def __init__(self, out: Path, *, plots: bool, ratios: bool) -> None:
        self.out, self.plots, self.ratios = out, plots, ratios
        self.machine: dict[str, str] = {}
        self.found: list[Outcome] = []

    def markdown(self) -> str:
        """Format all tables."""
        return tables(self.machine, self.found, ratios=self.ratios)

    def write(self) -> None:
        """Write all files."""
        out = self.out
        out.mkdir(parents=True, exist_ok=True)
        outcomes = [asdict(each) for each in self.found]
        values = {"schema": 1, "machine": self.machine, "outcomes": outcomes}
        (out / "values.json").write_text(json.dumps(values, indent=1) + "\n")
        (out / "tables.md").write_text(self.markdown())
        if self.plots:
            from benchmarks.compare.plots import plot_all

            plot_all(self.found, out)


async def _measure(arguments: argparse.Namespace, results: _Results) -> None:
    task = asyncio.current_task()
    if task:
        # As on Ctrl-C: guests are ended and settings restored.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    host = Runtime.open()
    with tempfile.TemporaryDirectory(prefix="onecopy-compare-") as work, removed_at_end(host):
        build_root(host, arguments.root, _tell)
        if arguments.guests:
            wares = await alike(host, Path(work), arguments.accel, _tell)
            for count in arguments.guests:
                await _ways(arguments, count, wares, results)
        if arguments.different:
            count = arguments.different
            wares = await different(host, Path(work), arguments.accel, count, _tell)
            await _ways(arguments, count, wares, results)


async def _ways(
    arguments: argparse.Namespace, count: int, wares: Sequence[Ware], results: _Results
) -> None:
    """Run each way, and write its results at once, so that a later failure does not lose them."""
    templates = Templates(_tell)
    results.machine = machine_facts(wares[0].setup, RUNS)
    ways = {way.name: way for way in WAYS}
    for name in arguments.ways:
        kind = "alike" if len(wares) < count else "different"
        _tell(f"{count} guests, {kind}: {name}")
        outcome = await measure(ways[name], count, wares, templates, _tell)
        each = f"{outcome.idle_memory / count / MIB:.1f} MiB each, idle"
        _tell(f"{each}, {outcome.seconds.median:.2f} s a start")
        results.found.append(outcome)
        results.write()


def main() -> int:
    """Run the comparison; return 0, or the exit code of the error."""
    arguments = _arguments()
    results = _Results(arguments.out, plots=arguments.plots, ratios=arguments.ratios)
    try:
        asyncio.run(_measure(arguments, results))
    except OnecopyError as error:
        print(f"compare: {error.message}\n{error.hint}".rstrip(), file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    print(results.markdown(), end="")
    _tell(f"what was found is in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
