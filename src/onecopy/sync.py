"""onecopy from Python, with blocking calls: `onecopy.aio`, run in a thread.

Each method is the one of the same name there. Any number of threads may use one Host.
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
from onecopy.guest.end_reason import Ended
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.transfer.destination import StrPath
from onecopy.leaving import at_exit
from onecopy.loop import LoopThread
from onecopy.store import Artifact

#: Seconds that what runs may take to be undone when the program leaves.
_PATIENCE = 10.0
_P = ParamSpec("_P")
_T = TypeVar("_T")
_A = TypeVar("_A", covariant=True)


def _nothing() -> None:
    pass


class _Blocking(Protocol[_A]):
    """One of our objects, with what it stands for."""

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
    """A running guest."""

    def __init__(self, guest: aio.Guest, loop: LoopThread) -> None:
        self._async = guest
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._async)

    @property
    def name(self) -> str:
        """Its name, and its hostname at the start."""
        return self._async.name

    @property
    def record(self) -> GuestRecord:
        """What it is (docs/json.md), as it was when it was looked up."""
        return self._async.record

    def port(self, port: int) -> int:
        """The port of 127.0.0.1 by which a published port of the guest is reached."""
        return self._async.port(port)

    def keep(self) -> None:
        """Let it outlive its block and this process: it is the user's, as `onecopy run`'s are."""
        self._async.keep()

    def log(self) -> str:
        """What QEMU and the guest's console have printed; the last of it if it ended by itself."""
        return self._async.log()

    def ended(self) -> Ended | None:
        """How it ended, if it did by itself and is still known; None if not."""
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
    """A host: its store, and its guests. A context manager, at whose end its guests end.

    Guests that a program starts belong to it: they end with their block, after Ctrl-C, too, and if
    the program is killed with the next onecopy command.
    """

    def __init__(self, home: StrPath | None = None) -> None:
        """``home`` is the store's folder; default: that of the commands."""
        self._async = aio.Host(home)
        self._loop = LoopThread()
        self._forget: Callable[[], None] = _nothing

    def open(self) -> Host:
        """Begin to use it, without a ``with`` block; `close` ends that. Raises RuntimeError.

        A program that leaves without closing it ends its guests all the same.
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
        """End its guests, and what still runs; as often as you like."""
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
        """All guests that run, also those that others have started."""
        return [Guest(each, self._loop) for each in self._async.guests()]

    def guest(self, name: str) -> Guest:
        """A running guest; raise NotFound."""
        return Guest(self._async.guest(name), self._loop)

    def ended(self) -> list[GuestRecord]:
        """Guests that ended by themselves, and are known until `forget`; ``ended`` says why."""
        return self._async.ended()

    def forget(self, *names: str) -> None:
        """Remove what is known of guests that ended by themselves, their logs included."""
        self._async.forget(*names)

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """What is stored: every ``segment``, ``system`` and ``kernel``."""
        return self._async.artifacts(kind)

    start = _guests(aio.Host.start)
    boot = _guests(aio.Host.boot)
    pool = _blocking(aio.Host.pool)
    report = _blocking(aio.Host.report)
    save = _blocking(aio.Host.save)
