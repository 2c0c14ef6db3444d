"""Several guests at once: all start, or none does; they take turns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import GuestFailed, OnecopyError
from onecopy.guest.lifecycle import admission
from onecopy.guest.lifecycle.disks import remove_made
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux.process import exists


class Started(msgspec.Struct, frozen=True):
    """What came of starting several guests."""

    guests: tuple[GuestRecord, ...]
    failures: tuple[tuple[str, OnecopyError], ...]
    """(name, why) of those that could not start."""


def turns() -> asyncio.Semaphore:
    """What each of many guests waits for before it has work for the host's processors.

    More at once than there are processors only makes each of them ready later.
    """
    return asyncio.Semaphore(2 * (os.cpu_count() or 1))


async def start_many(
    host: Runtime,
    starts: Mapping[str, Callable[[Batch], Awaitable[GuestRecord]]],
    *,
    keep_going: bool = False,
    owner: Path | None = None,
    each: int = 0,
    ran: Callable[[GuestRecord], None] | None = None,
) -> Started:
    """Start guests concurrently, by name, and hand them out together.

    If one cannot start all others are ended again and its error is raised, unless ``keep_going``:
    then they run on, and the failures are told beside them. Interrupted, it leaves none. Those of
    an ``owner`` (Runtime.owner) end with it. Raises InsufficientResources if the host has no memory
    for guests of ``each`` bytes (admission.py); with 0 it does not look. ``ran`` is called of each
    guest that runs.
    """
    if each and not keep_going:
        admission.require(each, len(starts))
    turn = turns()

    async def one(name: str, batch: Batch) -> GuestRecord:
        async with turn:
            if each:
                # Others may have taken it meanwhile, or these guests more than was thought.
                admission.require(each)
            record = await starts[name](batch)
            if ran:
                ran(record)
            return record

    with host.batch(owner) as batch:
        tasks = {name: asyncio.ensure_future(one(name, batch)) for name in starts}
        when = asyncio.ALL_COMPLETED if keep_going else asyncio.FIRST_EXCEPTION
        try:
            await asyncio.wait(tasks.values(), return_when=when)
        except asyncio.CancelledError:
            await _settle(host, tasks, keep=False)
            raise
        started = await _settle(host, tasks, keep=keep_going)
        if started.failures and not keep_going:
            raise started.failures[0][1]
        batch.hand_out()
    return started


async def _settle(
    host: Runtime, tasks: Mapping[str, asyncio.Future[GuestRecord]], *, keep: bool
) -> Started:
    """End what still starts and, unless ``keep``, what runs if not all do; return what is left.

    Raises what is no OnecopyError.
    """
    cancelled = await _ended(tasks.values())
    keep = keep and not cancelled
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    outcome = {name: _seen(result) for name, result in zip(tasks, results, strict=True)}
    kept = [each for each in outcome.values() if isinstance(each, GuestRecord)]
    if cancelled or len(kept) < len(tasks):
        kept = kept if keep else []
        names = {each.name for each in kept}
        started = [each for each in results if isinstance(each, GuestRecord)]
        undo(host, [each for each in started if each.name not in names])
    if cancelled:
        raise cancelled
    failures = []
    for name, each in outcome.items():
        if isinstance(each, OnecopyError):
            failures.append((name, each))
        elif isinstance(each, Exception):
            raise each
    return Started(tuple(kept), tuple(failures))


async def _ended(tasks: Iterable[asyncio.Future[GuestRecord]]) -> asyncio.CancelledError | None:
    """Cancel tasks, and wait for all of them whoever cancels us meanwhile; the last who did."""
    left, cancelled = set(tasks), None
    while left:
        for task in left:
            task.cancel()
        try:
            _, left = await asyncio.wait(left)
        except asyncio.CancelledError as error:
            cancelled, left = error, {task for task in left if not task.done()}
    return cancelled


def undo(host: Runtime, records: Sequence[GuestRecord]) -> None:
    """End guests as if they had never been: with the disks that were made for them."""
    host.end(*records)
    for record in records:
        remove_made(host, record)


def _seen(result: GuestRecord | BaseException) -> GuestRecord | BaseException:
    """What came of one: it may have ended, unseen, before all had been started."""
    if isinstance(result, GuestRecord) and not exists(result.pid):
        return GuestFailed(
            f"the QEMU of {result.name} ended again before all had been started",
            hint="if the kernel was out of memory, which `dmesg` tells: start fewer",
        )
    return result
