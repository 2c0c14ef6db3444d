"""Starts several guests concurrently: all of them or none.

Not here: how one guest starts (launcher.py).
"""

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
    """The result of starting several guests."""

    guests: tuple[GuestRecord, ...]
    failures: tuple[tuple[str, OnecopyError], ...]
    """Pairs (name, error) of the guests that did not start."""


def turns() -> asyncio.Semaphore:
    """Return a semaphore that bounds how many guests use the host's processors at once.

    With more busy guests than processors, each guest only becomes ready later.
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
    """Start guests concurrently and hand them out together; a cancellation leaves none.

    Args:
        starts: Name of a guest -> the function that starts it.
        keep_going: Return failures beside the guests that run. False: one failure ends all guests.
        owner: The directory of an owner, with which the guests end (Runtime.owner).
        each: Bytes that the host must have for each guest (admission.py); 0 skips the check.
        ran: Called with each guest that runs.

    Raises:
        InsufficientResources: The host has too little memory.
        OnecopyError: The first failure, without ``keep_going``.
    """
    if each and not keep_going:
        admission.require(each, len(starts))
    turn = turns()

    async def one(name: str, batch: Batch) -> GuestRecord:
        async with turn:
            if each:
                # Meanwhile other processes, or these guests, may have taken more than expected.
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
    """End the pending starts and, after a failure without ``keep``, the guests that run.

    Returns:
        The remaining guests, and the failures.

    Raises:
        CancelledError: This task was cancelled.
        Exception: A start failed with an error that is no OnecopyError.
    """
    cancelled = await _cancel(tasks.values())
    keep = keep and not cancelled
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    outcome = {name: _check_alive(result) for name, result in zip(tasks, results, strict=True)}
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


async def _cancel(tasks: Iterable[asyncio.Future[GuestRecord]]) -> asyncio.CancelledError | None:
    """Cancel tasks and wait for their ends; return the last cancellation of this task, if any."""
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
    """End guests and remove the disks that were made for them."""
    host.end(*records)
    for record in records:
        remove_made(host, record)


def _check_alive(result: GuestRecord | BaseException) -> GuestRecord | BaseException:
    """Return the result of one start; GuestFailed if the guest ended before all had started."""
    if isinstance(result, GuestRecord) and not exists(result.pid):
        return GuestFailed(
            f"QEMU of {result.name} ended before all guests had started",
            hint="if `dmesg` says that the kernel ran out of memory, start fewer guests",
        )
    return result
