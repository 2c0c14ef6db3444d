"""`python -m benchmarks`: measures, prints Markdown, and removes everything that it started.

Not here: the measurements (kinds.py, starts.py, firststart.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.batches import measure_batches
from benchmarks.firstguest import measure_first_guests
from benchmarks.firststart import measure_first_starts
from benchmarks.idle import measure_idle
from benchmarks.kinds import measure_kinds
from benchmarks.layout import measure_layouts
from benchmarks.many import measure_many
from benchmarks.report import Report, machine_facts
from benchmarks.setup import ALONE, SYSTEM, Setup, set_up
from benchmarks.starts import measure_starts
from benchmarks.translated import measure_translated
from benchmarks.truth import measure_truth
from onecopy.errors import OnecopyError
from onecopy.guest.runtime import Runtime
from onecopy.model import Reference
from onecopy.vmm.accel import Choice

PARTS = ("starts", "batches", "programs", "first", "kinds", "idle")
#: Parts that run on request only: they need a large root, almost the whole host, or much time.
FURTHER = ("layout", "many", "truth", "translated")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/bench",
        description="Measure plain guests, KSM, segments and saved systems side by side.",
        epilog="The store is that of onecopy (ONECOPY_HOME); the root segment bench-root "
        "stays in it. KSM is the whole host's: it is switched on for a while, then as it was.",
    )
    parser.add_argument(
        "what",
        nargs="*",
        choices=[[], *PARTS, *FURTHER],
        help=f"what to measure: {', '.join(PARTS)} (default: these), {', '.join(FURTHER)}",
    )
    parser.add_argument("--guests", type=int, default=4, help="guests of each kind (default: 4)")
    parser.add_argument("--starts", type=int, default=21, help="single starts (default: 21)")
    parser.add_argument("--batch", type=int, default=32, help="clones at once (default: 32)")
    parser.add_argument("--idle", type=int, default=16, help="idle clones (default: 16)")
    parser.add_argument("--root", type=Reference.parse, help="a Debian root with python3 to use")
    parser.add_argument("--programs", type=int, default=3, help="first starts of a program")
    parser.add_argument("--first", type=int, default=5, help="starts of a first guest, each way")
    parser.add_argument(
        "--drop-caches",
        action="store_true",
        help="before each of them drop the whole host's page cache, and not only the blobs",
    )
    parser.add_argument("--layouts", type=int, default=3, help="guests of each layout (default: 3)")
    parser.add_argument("--many", type=int, default=400, help="clones of `many` (default: 400)")
    parser.add_argument("--quick", action="store_true", help="2 guests, 3 starts, 1 program")
    parser.add_argument("--no-ksm", action="store_true", help="leave the host's KSM alone")
    parser.add_argument("--accel", choices=list(Choice), default=Choice.AUTO, type=Choice)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.guests, arguments.starts, arguments.programs, arguments.idle = 2, 3, 1, 2
        arguments.first = arguments.layouts = 1
        arguments.many = arguments.batch = 8
    once = ("starts", "batch", "programs", "first", "layouts", "many")
    if min(arguments.guests - 1, *(getattr(arguments, each) for each in once)) < 1:
        parser.error("at least 2 guests, and 1 of everything else")
    return arguments


def _tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


async def _measure(arguments: argparse.Namespace) -> Report:
    task = asyncio.current_task()
    if task:
        # As on Ctrl-C: guests are ended and settings restored.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    host = Runtime.open()
    with tempfile.TemporaryDirectory(prefix="onecopy-bench-") as work:
        try:
            setup = await set_up(host, Path(work), arguments.accel, _tell, arguments.root)
            return await _all(setup, arguments)
        finally:
            for system in (SYSTEM, ALONE):
                if host.store.find(system, "system"):
                    host.store.remove(system)


async def _all(setup: Setup, arguments: argparse.Namespace) -> Report:
    wanted = arguments.what or PARTS
    report = Report(machine_facts(setup))
    if "starts" in wanted:
        report.starts = await measure_starts(setup, arguments.starts, _tell)
    if "batches" in wanted:
        report.batches = await measure_batches(setup, arguments.batch, _tell)
    if "programs" in wanted:
        report.programs = await measure_first_starts(setup, arguments.programs, _tell)
    if "first" in wanted:
        report.first = await measure_first_guests(
            setup, arguments.first, arguments.drop_caches, _tell
        )
    if "kinds" in wanted:
        report.kinds = await measure_kinds(setup, arguments.guests, not arguments.no_ksm, _tell)
    if "idle" in wanted:
        report.idle = await measure_idle(setup, arguments.idle, not arguments.no_ksm, _tell)
    await _further(setup, arguments, wanted, report)
    return report


async def _further(
    setup: Setup, arguments: argparse.Namespace, wanted: Sequence[str], report: Report
) -> None:
    if "layout" in wanted:
        report.layouts = await measure_layouts(setup, arguments.layouts, _tell)
    if "many" in wanted:
        report.many = await measure_many(setup, arguments.many, _tell)
    if "truth" in wanted:
        report.truth = await measure_truth(setup, arguments.idle, arguments.guests, _tell)
    if "translated" in wanted:
        report.translated = await measure_translated(setup, arguments.programs, _tell)


def main() -> int:
    """Run the chosen parts; return 0, or the exit code of the error."""
    arguments = _arguments()
    try:
        report = asyncio.run(_measure(arguments))
    except OnecopyError as error:
        print(f"bench: {error.message}\n{error.hint}".rstrip(), file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    markdown = report.to_markdown()
    print(markdown, end="")
    if arguments.json:
        text = json.dumps(report.to_json(), indent=2, default=msgspec.to_builtins)
        arguments.json.write_text(text + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
