"""Locks that go with their holder: flock(2), dropped by the kernel however a process ends.

Not here: what a lock stands for (store/lease.py, guest/run_directory.py, vmm/monitor.py).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from onecopy.errors import OnecopyError

#: A link there would have somebody else's file opened, and made.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def is_held(path: Path) -> bool:
    """Whether a process holds the exclusive lock on ``path``; gone counts as not held."""
    return _free_links(path) is None


def is_left(path: Path) -> bool:
    """Whether ``path`` is there though its holder is gone, that is, was killed.

    Any other holder removes it before letting go. So what is removed while we look is not left,
    which "it exists, and `is_held` says no" would make of it.
    """
    return bool(_free_links(path))


def _free_links(path: Path) -> int | None:
    """How many names a file has that nobody holds, 0 once it is removed; None while it is held.

    The test takes a shared lock. Shared locks do not exclude one another, so one tester never looks
    like a holder to the next.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.fstat(fd).st_nlink
    except BlockingIOError:
        return None
    finally:
        os.close(fd)


@contextmanager
def alone(path: Path) -> Iterator[int]:
    """The same as `locked` for what is no task, and need not be: it waits for the lock."""
    fd = _opened_alone(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _opened_alone(path: Path) -> int:
    while True:
        fd = os.open(path, _FLAGS, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd
        except BaseException:
            os.close(fd)
            raise
        # It was removed while we waited: others lock a new one.
        os.close(fd)


@contextmanager
def if_left(path: Path) -> Iterator[int | None]:
    """The lock on what is left of a holder that is gone (`is_left`), at once; else None."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield fd if _try(fd) and os.fstat(fd).st_nlink else None
    finally:
        os.close(fd)


@asynccontextmanager
async def locked(path: Path, pause: float = 0.05) -> AsyncIterator[int]:
    """Hold the exclusive lock on ``path``, made if missing; yields its descriptor.

    Waits without holding up other tasks, and looks again after at most ``pause`` seconds. Raises
    OSError.
    """
    delay = 0.001
    while (fd := _taken(path)) is None:
        await asyncio.sleep(delay)
        delay = min(delay * 2, pause)
    try:
        yield fd
    finally:
        os.close(fd)


@asynccontextmanager
async def locked_within(path: Path, seconds: float, late: OnecopyError) -> AsyncIterator[int]:
    """The same for who waits ``seconds`` at most, and raises ``late`` then."""
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(seconds):
                fd = await stack.enter_async_context(locked(path))
        except TimeoutError:
            raise late from None
        yield fd


def _taken(path: Path) -> int | None:
    """The lock, if it is free now; not that of a file which has just been removed."""
    fd = os.open(path, _FLAGS, 0o600)
    if _try(fd) and os.fstat(fd).st_nlink:
        return fd
    os.close(fd)
    return None


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
