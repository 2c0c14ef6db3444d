"""`python -m compare`: run all ways, print Markdown, write values and plots.

Not here: the ways (ways.py), what is measured (run.py).
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

from benches.report import machine_facts
from compare.mix import RUNS, Ware, alike, different, removed_at_end
from compare.plots import plot_all
from compare.run import Outcome, measure
from compare.tables import tables
from compare.templating import Templates
from compare.ways import WAYS
from onecopy.errors import OnecopyError
from onecopy.guest.host import Host
from onecopy.vmm.accel import Choice


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/compare",
        description="Run the same guests (python, nginx, redis) without sharing, with KSM, with a "
        "segment, from a frozen guest, from a saved system, and with all of it.",
        epilog="The store is that of onecopy (ONECOPY_HOME); the root segment onecopy-compare-root "
        "stays in it. KSM is the whole host's: it is switched on for a while, then as it was.",
    )
    parser.add_argument(
        "--guests", type=int, nargs="*", default=[8, 32], help="how many alike (default: 8 32)"
    )
    parser.add_argument(
        "--different", type=int, default=8, help="guests that have a root each (default: 8)"
    )
    names = [way.name for way in WAYS]
    parser.add_argument("--ways", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--accel", choices=list(Choice), default=Choice.AUTO, type=Choice)
    parser.add_argument(
        "--out", type=Path, default=Path("out/compare"), help="folder (default: out/compare)"
    )
    arguments = parser.parse_args()
    if min(arguments.guests, default=4) < 4 or arguments.different in range(1, 3):
        parser.error("at least 4 guests that are alike, 3 that are different, or none")
    return arguments


def _tell(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


async def _measure(arguments: argparse.Namespace) -> tuple[dict[str, str], list[Outcome]]:
    task = asyncio.current_task()
    if task:
        # As on Ctrl-C: what runs is ended, what was set is restored.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    host = Host.open()
    with tempfile.TemporaryDirectory(prefix="onecopy-compare-") as work, removed_at_end(host):
        found: list[Outcome] = []
        facts: dict[str, str] = {}
        if arguments.guests:
            wares = await alike(host, Path(work), arguments.accel, _tell)
            for count in arguments.guests:
                found += await _ways(arguments.ways, count, wares)
            facts = machine_facts(wares[0].setup, RUNS)
        if arguments.different:
            count = arguments.different
            wares = await different(host, Path(work), arguments.accel, count, _tell)
            found += await _ways(arguments.ways, count, wares)
            facts = machine_facts(wares[0].setup, RUNS)
        return facts, found


async def _ways(names: Sequence[str], count: int, wares: Sequence[Ware]) -> list[Outcome]:
    found, templates = [], Templates(_tell)
    for way in WAYS:
        if way.name in names:
            kind = "alike" if len(wares) < count else "different"
            _tell(f"{count} guests, {kind}: {way.name}")
            found.append(await measure(way, count, wares, templates))
    return found


def main() -> int:
    """Run all; the exit code is onecopy's for the error."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        machine, found = asyncio.run(_measure(arguments))
    except OnecopyError as error:
        print(f"compare: {error.message}\n{error.hint}".rstrip(), file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    values = {"schema": 1, "machine": machine, "outcomes": [asdict(each) for each in found]}
    (arguments.out / "values.json").write_text(json.dumps(values, indent=1) + "\n")
    markdown = tables(machine, found)
    (arguments.out / "tables.md").write_text(markdown)
    plot_all(found, arguments.out)
    print(markdown, end="")
    _tell(f"values, tables and plots are in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
