"""Asking a reader: a guest of our own in which a disk image is mounted (files/reader).

Whoever made the image may have taken the guest over with it, so nothing that it says is believed:
answers are bounded, parsed strictly, and have deadlines. Not here: its QEMU (vmm/reader_vm.py),
what is asked in which order (images/sources/disk.py).
"""

from __future__ import annotations

import io
import re
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from onecopy.errors import BadSource, CommandFailed
from onecopy.images.partitions import shown
from onecopy.vmm.reader_vm import Disk, Parts, Running, reading

#: Seconds that it may take to boot, and for all answers together: journals may have to be replayed.
_BOOT, _PATIENCE = 300.0, 1800.0
#: Seconds in which something must come while files are sent.
_STALL = 120.0
_ANSWER = 1 << 20
#: Seconds from the beginning of an answer to its end.
_REST = 30.0
_PLAIN = [(chr(b).isalnum() and b < 128) or chr(b) in "/._-=,@:+" for b in range(256)]
_HEAD = re.compile(rb"([0-9]{1,3}) ([0-9]{1,7})\n")
_TOTAL = re.compile(r"^Total bytes written: ([0-9]{1,20}) ", re.MULTILINE)
#: What a line of the console has that tells why the guest's kernel gave up.
_TELLING = re.compile(r"panic|EXT[234]-fs|JBD2|XFS|BTRFS|I/O error|BUG|Oops|onecopy:|qemu", re.I)
_T = TypeVar("_T")
_HINT = "check and repair the image with its own tools (e2fsck, xfs_repair, btrfs check)"


class Answer(msgspec.Struct, frozen=True):
    """What the reader said."""

    ok: bool
    text: str
    """At most a MiB; bytes that are no UTF-8 are replaced."""

    @property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.splitlines()


@contextmanager
def reader(parts: Parts, disk: Disk) -> Iterator[Reader]:
    """A reader that has booted; raises BadSource if it does not, MissingProgram, Incompatible."""
    with reading(parts, disk) as running:
        found = Reader(running)
        found.ask("hello", patience=_BOOT)
        yield found


class Reader:
    """A reader that runs."""

    def __init__(self, running: Running) -> None:
        self._tool = running.tool
        self._control, self._data = running.control, running.data
        self._buffer = bytearray()
        self._left = _PATIENCE

    def ask(self, command: str, *words: str, patience: float = _PATIENCE) -> Answer:
        """What it answers; raise BadSource if it ends instead, or does not within ``patience``."""
        begin = time.monotonic()
        self._request(command, words)
        answer = self._answer(begin + min(patience, self._left))
        self._left -= time.monotonic() - begin
        return answer

    def files(self, leave_out: Sequence[str], patience: float) -> Files:
        """The tree's files, which come as a tar archive; in ``patience`` seconds, or never."""
        self._request("copy", leave_out)
        return Files(self, time.monotonic() + patience)

    def receive(self, buffer: Any, until: float) -> int | Answer:
        """Wait for files, which go into ``buffer``, or for the answer to what was asked.

        Raises BadSource if neither comes until then.
        """
        ready = _ready((self._data, self._control), until)
        if not ready:
            raise self.broken("it sends no more")
        if self._data not in ready:
            return self._answer(time.monotonic() + _REST)
        try:
            size = self._data.recv_into(buffer)
        except OSError:
            size = 0
        if not size:
            raise self.broken("it ended")
        return size

    def _request(self, command: str, words: Sequence[str]) -> None:
        line = " ".join([command, *map(_word, words)]) + "\n"
        if len(line) > 32 << 10:
            raise BadSource("names in it are too long", hint=_HINT)
        self._control.setblocking(True)
        self._control.settimeout(30)
        try:
            self._control.sendall(line.encode())
        except OSError as error:
            raise self.broken("it ended") from error
        finally:
            self._control.setblocking(False)

    def _answer(self, deadline: float) -> Answer:
        head = self._until(lambda: _HEAD.match(self._buffer), deadline)
        code, size = int(head[1]), int(head[2])
        if size > _ANSWER:
            raise self.broken("its answer is too long")
        begin, end = head.end(), head.end() + size
        self._until(lambda: len(self._buffer) >= end or None, deadline)
        text = self._buffer[begin:end].decode(errors="replace")
        del self._buffer[:end]
        return Answer(code == 0, text)

    def _until(self, found: Callable[[], _T | None], deadline: float) -> _T:
        while (result := found()) is None:
            if len(self._buffer) > _ANSWER + 64:
                raise self.broken("its answer is too long")
            if not _HEAD.match(self._buffer) and len(self._buffer) > 16:
                raise self.broken("its answer makes no sense")
            if not _ready((self._control,), deadline):
                raise self.broken("it does not answer")
            try:
                data = self._control.recv(64 << 10)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                raise self.broken("it ended")
            self._buffer += data
        return result

    def broken(self, what: str) -> BadSource:
        """End it; the error says ``what`` is wrong, and what its kernel or QEMU said last."""
        self._control.close()
        if what != "it ended":
            self._tool.end()
        try:
            printed = self._tool.finish(fine=range(-64, 256))
            text = f"{printed.out}\n{printed.err}"
        except CommandFailed as error:
            text = error.output
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if _TELLING.search(line)] or lines
        said = "\n".join(f"  {shown(line)}" for line in telling[-6:])
        return BadSource(
            f"the guest that reads it failed ({what}); its last words were:\n{said}", hint=_HINT
        )


class Files(io.RawIOBase):
    """A tar archive as it comes, up to its end."""

    def __init__(self, guest: Reader, deadline: float) -> None:
        self._guest, self._deadline = guest, deadline
        self._sent = 0
        self._total: int | None = None
        self.answer: Answer | None = None
        """What tar said, once it has ended."""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for what comes next; raise BadSource if nothing does, or it takes too long."""
        while self._total is None or self._sent < self._total:
            now = time.monotonic()
            if now > self._deadline:
                raise self._guest.broken("it takes too long")
            got = self._guest.receive(buffer, min(self._deadline, now + _STALL))
            if isinstance(got, int):
                self._sent += got
                return got
            if self.answer:
                raise self._guest.broken("it answers twice")
            self.answer = got
            found = _TOTAL.search(got.text)
            # Where tar failed before it could say: what has come.
            self._total = int(found[1]) if found else self._sent
        if self._sent > self._total:
            raise self._guest.broken("it sends more than it says")
        return 0


def _word(text: str) -> str:
    """``text`` as one word for the reader: an argument of printf(1)'s %b."""
    data = text.encode(errors="surrogateescape") or b"\0"
    return "".join(chr(b) if _PLAIN[b] else f"\\0{b:03o}" for b in data)


def _ready(ends: Sequence[socket.socket], until: float) -> list[socket.socket]:
    """Those of ``ends`` at which something has come, once it has; none if nothing does by then."""
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    found = dict(poll.poll(max(0, until - time.monotonic()) * 1000))
    return [end for end in ends if end.fileno() in found]
