"""Locks that end with their holder: the kernel drops flock(2) locks however a process ends.

Not here: what each lock protects (store/lease.py, guest/run_directory.py, vmm/monitor.py).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from onecopy.errors import OnecopyError

#: O_NOFOLLOW: through a symbolic link another user's file would be opened or created.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
#: Seconds between two attempts to take a lock in a limited time.
_PAUSE = 0.002


def flock(fd: int, *, wait: bool = True) -> bool:
    """Take the exclusive lock on an open file, as long as any copy of the descriptor is open.

    Args:
        wait: Block this thread until the lock is free; if False, return False if it is not.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Drop the lock even if a child that was forked meanwhile has a copy of the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def is_held(path: Path) -> bool:
    """Whether a process holds the exclusive lock on ``path``; False if the file does not exist."""
    return _free_links(path) is None


def is_left(path: Path) -> bool:
    """Whether ``path`` exists though its holder was killed.

    Every holder that ends normally removes the file before it drops the lock. A check for the file
    followed by `is_held` would be wrong if the file is removed in between.
    """
    return bool(_free_links(path))


def _free_links(path: Path) -> int | None:
    """Return the number of names of an unlocked file, 0 if it was removed; None if it is locked.

    The test takes a shared lock. Shared locks do not exclude each other, so concurrent tests do not
    mistake each other for a holder.
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
def locked_blocking(path: Path, patience: float | None = None) -> Iterator[int]:
    """Hold the exclusive lock on ``path`` like `locked`, but block this thread while waiting.

    Args:
        patience: the seconds to wait; None waits for ever.

    Raises:
        TimeoutError: the lock was not free in that time.
    """
    fd = _open_locked(path, patience)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_locked(path: Path, patience: float | None) -> int:
    while True:
        fd = os.open(path, _FLAGS, 0o600)
        try:
            if patience is None:
                flock(fd)
            else:
                _flock_within(fd, patience, path)
            if os.fstat(fd).st_nlink:
                return fd
        except BaseException:
            os.close(fd)
            raise
        # The file was removed while this waited, and others lock a new file of that name.
        os.close(fd)


def _flock_within(fd: int, seconds: float, path: Path) -> None:
    deadline = time.monotonic() + seconds
    while not flock(fd, wait=False):
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has locked {path} for {seconds:g} seconds")
        time.sleep(_PAUSE)


@contextmanager
def take_over(path: Path) -> Iterator[int | None]:
    """Yield the lock on a file that a killed holder left behind (`is_left`), else None."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield fd if flock(fd, wait=False) and os.fstat(fd).st_nlink else None
    finally:
        os.close(fd)


@asynccontextmanager
async def locked(path: Path, pause: float = 0.05) -> AsyncIterator[int]:
    """Hold the exclusive lock on ``path``, created if missing; yield its descriptor.

    The wait does not block other tasks.

    Args:
        pause: the longest time between two attempts, in seconds.

    Raises:
        OSError: the file cannot be opened.
    """
    # Most commands lock without an event loop, and it takes long to import.
    import asyncio

    delay = 0.001
    while (fd := _take(path)) is None:
        await asyncio.sleep(delay)
        delay = min(delay * 2, pause)
    try:
        yield fd
    finally:
        os.close(fd)


@asynccontextmanager
async def locked_within(path: Path, seconds: float, late: OnecopyError) -> AsyncIterator[int]:
    """Hold the lock like `locked`, but raise ``late`` after waiting for ``seconds``."""
    import asyncio

    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(seconds):
                fd = await stack.enter_async_context(locked(path))
        except TimeoutError:
            raise late from None
        yield fd


def _take(path: Path) -> int | None:
    """Take the lock if it is free now, unless the file was just removed."""
    fd = os.open(path, _FLAGS, 0o600)
    if flock(fd, wait=False) and os.fstat(fd).st_nlink:
        return fd
    os.close(fd)
    return None
