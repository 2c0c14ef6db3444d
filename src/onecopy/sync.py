"""The Python API with blocking calls: runs `onecopy.aio` in a thread.

Each method calls the method of the same name in `onecopy.aio`. Any number of threads may use one
Host.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    contextmanager,
)
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from onecopy import aio
from onecopy.guest.end import Ended
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.transfer.destination import StrPath
from onecopy.leaving import at_exit
from onecopy.loop import LoopThread
from onecopy.store import Artifact

#: Seconds for running calls to undo their work when the program exits.
_PATIENCE = 10.0
_P = ParamSpec("_P")
_T = TypeVar("_T")
_A = TypeVar("_A", covariant=True)


def _do_nothing() -> None:
    pass


class _Blocking(Protocol[_A]):
    """An object of this file, with the asyncio object that it wraps and the loop of both."""

    @property
    def _async(self) -> _A: ...
    @property
    def _loop(self) -> LoopThread: ...


def _blocking(
    method: Callable[Concatenate[_A, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_Blocking[_A], _P], _T]:
    @wraps(method)
    def call(self: _Blocking[_A], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._loop.run(method(self._async, *args, **kwargs))

    return call


def _guests(
    method: Callable[Concatenate[_A, _P], AbstractAsyncContextManager[list[aio.Guest]]],
) -> Callable[Concatenate[_Blocking[_A], _P], AbstractContextManager[list[Guest]]]:
    @wraps(method)
    @contextmanager
    def call(self: _Blocking[_A], /, *args: _P.args, **kwargs: _P.kwargs) -> Iterator[list[Guest]]:
        with self._loop.entered(method(self._async, *args, **kwargs)) as guests:
            yield [Guest(each, self._loop) for each in guests]

    return call


class Guest:
    """A running guest.

    `Host.start`, `Host.boot`, `Host.guests` and `Host.guest` return the instances.
    Methods that need the guest to run raise NotFound if it has ended.
    """

    def __init__(self, guest: aio.Guest, loop: LoopThread) -> None:
        self._async = guest
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._async)

    @property
    def name(self) -> str:
        """The guest's name, which is also its hostname when it starts."""
        return self._async.name

    @property
    def record(self) -> GuestRecord:
        """The guest's record (docs/json.md) from the time of the look-up."""
        return self._async.record

    @property
    def forked(self) -> bool | None:
        """Whether a fork server started the guest's QEMU; None if unknown.

        ``record.why_exec`` says why none did.
        """
        return self._async.forked

    def port(self, port: int) -> int:
        """Return the host's port, on 127.0.0.1, that leads to a published port of the guest.

        Args:
            port: The guest's port.

        Raises:
            NotFound: The port is not published.
        """
        return self._async.port(port)

    def keep(self) -> None:
        """Let the guest outlive its block and this process, like a guest of `onecopy run`."""
        self._async.keep()

    def log(self) -> str:
        """Return the output of QEMU and of the guest's console.

        For a guest that ended by itself, return the last part of it.

        Raises:
            NotFound: The guest was stopped, or forgotten after its end.
        """
        return self._async.log()

    def ended(self) -> Ended | None:
        """Return when and why the guest ended by itself.

        Returns:
            None if the guest runs, was stopped, or was forgotten after its end.
        """
        return self._async.ended()

    exec = _blocking(aio.Guest.exec)
    copy_in = _blocking(aio.Guest.copy_in)
    copy_out = _blocking(aio.Guest.copy_out)
    attach = _blocking(aio.Guest.attach)
    detach = _blocking(aio.Guest.detach)
    commit = _blocking(aio.Guest.commit)
    save = _blocking(aio.Guest.save)
    wait = _blocking(aio.Guest.wait)
    stop = _blocking(aio.Guest.stop)


class Host:
    """A host with its store and its guests; a context manager.

    The guests that a program starts belong to the program. They end with the block that started
    them, also after Ctrl-C. If the program is killed, the next onecopy command ends them.
    Methods raise RuntimeError if the host is not open.
    """

    def __init__(self, home: StrPath | None = None) -> None:
        """Prepare a host; `open` or a ``with`` block begins its use.

        Args:
            home: The store's directory; None for the directory that the commands use.
        """
        self._async = aio.Host(home)
        self._loop = LoopThread()
        self._forget: Callable[[], None] = _do_nothing

    def open(self) -> Host:
        """Open the host without a ``with`` block; `close` closes it.

        If the program exits without `close`, its guests end as well.

        Returns:
            This host.

        Raises:
            RuntimeError: The host is already open.
        """
        self._async.require_closed()
        self._loop.__enter__()
        try:
            self._loop.run(self._async.open())
        except BaseException:
            self._loop.stop()
            raise
        self._forget = at_exit(self._leave)
        return self

    def close(self) -> None:
        """End the program's guests and running calls; repeated calls have no effect."""
        self._forget()
        if self._loop.runs:
            self._loop.run(self._async.close())
            self._loop.stop()

    def _leave(self) -> None:
        self._loop.stop(_PATIENCE)
        self._async.leave()

    def __enter__(self) -> Host:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def guests(self) -> list[Guest]:
        """Return all running guests, including those of other programs."""
        return [Guest(each, self._loop) for each in self._async.guests()]

    def guest(self, name: str) -> Guest:
        """Return a running guest by its name.

        Raises:
            NotFound: No running guest has this name.
        """
        return Guest(self._async.guest(name), self._loop)

    def ended(self) -> list[GuestRecord]:
        """Return the records of guests that ended by themselves, until `forget` removes them.

        The field ``ended`` of a record has the time and reason.
        """
        return self._async.ended()

    def forget(self, *names: str) -> None:
        """Remove the records and logs of guests that ended by themselves.

        Args:
            names: Names of ended guests; other names have no effect.
        """
        self._async.forget(*names)

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """Return the segments, saved systems and kernels in the store.

        Args:
            kind: Only ``segment``, ``system`` or ``kernel``; None for all kinds.
        """
        return self._async.artifacts(kind)

    start = _guests(aio.Host.start)
    boot = _guests(aio.Host.boot)
    pool = _blocking(aio.Host.pool)
    report = _blocking(aio.Host.report)
    save = _blocking(aio.Host.save)
