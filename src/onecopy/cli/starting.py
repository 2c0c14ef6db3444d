"""Starts guests for the commands `boot` and `run`.

Not here: their options (start_options.py), the start itself (guest/lifecycle).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from onecopy.cli import signals
from onecopy.cli.event_loop import asyncio
from onecopy.cli.output import (
    duration,
    print_json,
    print_line,
    progress,
    reasons,
    tell_error,
)
from onecopy.model import Mergeable

if TYPE_CHECKING:
    from onecopy.cli.start_options import StartOptions
    from onecopy.errors import OnecopyError
    from onecopy.guest.lifecycle.batch import Started
    from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec
    from onecopy.guest.run_directory import GuestRecord
    from onecopy.guest.runtime import Runtime


def start_guests(spec: BootSpec | CloneSpec, start: StartOptions, program: Sequence[str]) -> int:
    """Start the guests, or print their command lines; return the exit code of the command."""
    from onecopy.guest.lifecycle import start as door
    from onecopy.guest.runtime import Runtime

    request = door.Request(
        spec,
        start.number,
        start.name,
        keep_going=start.keep_going,
        overcommit=start.overcommit,
        needs_agent=bool(program),
    )
    host = Runtime.open()
    with progress() as tell:
        if start.ksm is Mergeable.ALL:
            _tell_of_ksm(tell)
        group = door.plan(host, request, tell)
        if not start.dry_run:
            begun = door.start(host, group)
            result = _run_to_end(host, begun, program, keep=start.keep)
            return print_started(result, as_json=start.as_json, quiet=bool(program))
    for argv in door.dry_run(host, group):
        print(shlex.join(argv))
    return _print_failed(group.refused)


def _tell_of_ksm(tell: Callable[[str], None]) -> None:
    from onecopy.linux.counters import ksm

    state = ksm.read()
    if state and state.run != 1:
        tell("KSM is stopped and merges nothing yet (root: `onecopy ksm on`)")


def _run_to_end(
    host: Runtime, start: Awaitable[Started], program: Sequence[str], *, keep: bool
) -> tuple[Started, int]:
    """Call `_start_and_run`; after an interrupt end the guests that were not reported."""
    from onecopy.guest.lifecycle.batch import undo

    unreported: list[GuestRecord] = []
    try:
        result = asyncio.run(_start_and_run(host, start, program, keep, unreported))
        signals.ignore()
    except BaseException:
        undo(host, unreported)
        raise
    return result


async def _start_and_run(
    host: Runtime,
    start: Awaitable[Started],
    program: Sequence[str],
    keep: bool,
    unreported: list[GuestRecord],
) -> tuple[Started, int]:
    """Start guests and run ``program`` in each; return the first exit code that is not 0.

    Args:
        keep: Keep the guests after the program.
        unreported: Without a program this list gets the guests, in the same step in which they are
            handed out.
    """
    started = await start
    if not program:
        unreported += started.guests
        return started, 0
    # A start alone does not need these.
    from onecopy.guest.exec import run_streaming
    from onecopy.guest.exec_streams import Streams, to_file
    from onecopy.guest.lifecycle.stop import sync_disks

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
    """Print the guests that started and those that did not; return the exit code."""
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
    return code or _print_failed(started.failures)


def _print_failed(failures: Sequence[tuple[str, OnecopyError]]) -> int:
    """Print the guests that did not or cannot start; return the exit code."""
    for name, error in failures:
        tell_error(error, f"{name} did not start: ")
    return failures[0][1].exit_code if failures else 0
