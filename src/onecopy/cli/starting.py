"""Starting guests from the command line: what `boot` and `run` have in common.

Not here: their options (start_options.py), and what starts guests (guest/lifecycle).
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from onecopy.cli import signals
from onecopy.cli.output import duration, print_json, print_line, reasons, tell_error
from onecopy.model import MIB, Mergeable

if TYPE_CHECKING:
    from onecopy.cli.start_options import Ports, StartOptions
    from onecopy.guest.lifecycle.admission import Need
    from onecopy.guest.lifecycle.batch import Started
    from onecopy.guest.run_directory import Batch, GuestRecord
    from onecopy.guest.runtime import Runtime

    Progress = Callable[[str], None]


class Starter(NamedTuple):
    """How each of several guests starts."""

    need: Need
    argv: Callable[[str, Ports], list[str]]
    start: Callable[[str, Ports, Batch], Awaitable[GuestRecord]]


def check(source: str, start: StartOptions, tell: Progress) -> None:
    """Raise InvalidInput for options that do not go together; tell what KSM does not do."""
    from onecopy.guest.lifecycle.batch import names_for
    from onecopy.guest.lifecycle.disks import check_disks
    from onecopy.linux.counters import ksm

    names_for(source, start.name, start.number)
    check_disks(start.disks, named=start.name is not None, count=start.number)
    if start.ksm is Mergeable.ALL and (state := ksm.read()) and state.run != 1:
        tell("KSM is stopped and merges nothing yet (root: `onecopy ksm on`)")


def start_guests(
    host: Runtime,
    source: str,
    starter: Starter,
    start: StartOptions,
    program: Sequence[str],
    tell: Progress,
) -> int:
    """Start the guests, or print how; return the exit code of the command."""
    from onecopy.guest.lifecycle import batch, pool
    from onecopy.guest.ports import numbered

    _tell_of_room(tell, starter.need)
    names = batch.names_for(source, start.name, start.number)
    ports = {one: numbered(start.publish, number) for number, one in enumerate(names)}
    if start.dry_run:
        for line in [starter.argv(one, ports[one]) for one in names]:
            print(shlex.join(line))
        return 0
    begun = batch.start_many(
        host,
        names,
        lambda one, batch: starter.start(one, ports[one], batch),
        keep_going=start.keep_going,
        each=0 if start.overcommit else starter.need.each,
    )
    code = print_started(
        _finished(host, begun, program, keep=start.keep),
        as_json=start.as_json,
        quiet=bool(program),
    )
    pool.refill(host)
    return code


def _tell_of_room(tell: Progress, need: Need) -> None:
    from onecopy.vmm.argv import TRANSLATED

    if need.translated < TRANSLATED:
        tell(
            f"each QEMU gets {need.translated // MIB} MiB for translated code instead of "
            f"{TRANSLATED // MIB} MiB, because the host lacks memory: busy guests are slower"
        )


def _finished(
    host: Runtime, start: Awaitable[Started], program: Sequence[str], *, keep: bool
) -> tuple[Started, int]:
    """As _then(); interrupted, even if all run by then, it leaves no guest that nobody knows of."""
    from onecopy.guest.lifecycle.batch import undo

    untold: list[GuestRecord] = []
    try:
        result = asyncio.run(_then(host, start, program, keep, untold))
        signals.ignore()
    except BaseException:
        undo(host, untold)
        raise
    return result


async def _then(
    host: Runtime,
    start: Awaitable[Started],
    program: Sequence[str],
    keep: bool,
    untold: list[GuestRecord],
) -> tuple[Started, int]:
    """Start, then run ``program`` in each guest; return the first exit code that is not 0.

    Without a program ``untold`` gets the guests, in the same step in which they are handed out.
    """
    from onecopy.guest.exec import run_streaming
    from onecopy.guest.exec_streams import Streams, to_file
    from onecopy.guest.lifecycle.stop import sync_disks

    started = await start
    if not program:
        untold += started.guests
        return started, 0
    sys.stdout.flush()
    passed = Streams(to_file(1), to_file(2))
    try:
        codes = await asyncio.gather(
            *(run_streaming(host.run / guest.name, program, passed) for guest in started.guests)
        )
    finally:
        if not keep:
            await asyncio.gather(*(sync_disks(host, guest) for guest in started.guests))
            host.end(*started.guests)
    return started, next((code for code in codes if code), 0)


def print_started(result: tuple[Started, int], *, as_json: bool, quiet: bool) -> int:
    """Print which guests started and which did not; return the exit code."""
    import msgspec

    started, code = result
    if as_json:
        failures = [
            {"name": name, "error": error.id, "message": error.message}
            for name, error in started.failures
        ]
        print_json({"guests": msgspec.to_builtins(started.guests), "failures": failures})
    elif not quiet:
        for guest in started.guests:
            ports = "".join(f" 127.0.0.1:{host}->{port}" for host, port in guest.publish)
            how = f"started in {duration(guest.start_seconds)} under {guest.accel}"
            print_line(f"{guest.name} {how}{ports}")
        for reason in reasons(started.guests):
            print_line(f"onecopy: {reason}", sys.stderr)
    for name, error in started.failures:
        tell_error(error, f"{name} did not start: ")
    return code or (started.failures[0][1].exit_code if started.failures else 0)
