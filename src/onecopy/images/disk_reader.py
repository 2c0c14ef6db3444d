"""Sends requests to a reader: onecopy's own guest that mounts a disk image (files/reader).

A malicious image may control the guest, so its replies are not trusted. Replies are bounded, parsed
strictly, and have deadlines. Not here: the reader's QEMU (vmm/reader_vm.py), the sequence of
requests (disk_files.py).
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

#: Seconds for the boot, and for all answers together: mounting may replay a journal.
_BOOT, _PATIENCE = 300.0, 1800.0
#: Seconds without data after which a copy fails.
_STALL = 120.0
#: The longest answer in bytes.
_ANSWER = 1 << 20
#: Seconds for the answer that ends a copy.
_REST = 30.0
_PLAIN = [(chr(b).isalnum() and b < 128) or chr(b) in "/._-=,@:+" for b in range(256)]
_HEAD = re.compile(rb"([0-9]{1,3}) ([0-9]{1,7})\n")
_TOTAL = re.compile(r"^Total bytes written: ([0-9]{1,20}) ", re.MULTILINE)
#: Console lines that explain a failure of the guest's kernel.
_TELLING = re.compile(r"panic|EXT[234]-fs|JBD2|XFS|BTRFS|I/O error|BUG|Oops|onecopy:|qemu", re.I)
_T = TypeVar("_T")
_HINT = "check and repair the image with its own tools (e2fsck, xfs_repair, btrfs check)"


class Answer(msgspec.Struct, frozen=True):
    """An answer of the reader."""

    ok: bool
    text: str
    """At most 1 MiB; invalid UTF-8 is replaced."""

    @property
    def lines(self) -> list[str]:
        """The lines of ``text``."""
        return self.text.splitlines()


@contextmanager
def reader(parts: Parts, disk: Disk) -> Iterator[Reader]:
    """Boot a reader for ``disk``, and end it on leaving the block.

    Raises:
        BadSource: The reader does not boot.
        MissingProgram, Incompatible: This host cannot run it.
    """
    with reading(parts, disk) as running:
        found = Reader(running)
        found.ask("hello", patience=_BOOT)
        yield found


class Reader:
    """A running reader."""

    def __init__(self, running: Running) -> None:
        self._tool = running.tool
        self._control, self._data = running.control, running.data
        self._buffer = bytearray()
        self._left = _PATIENCE

    def ask(self, command: str, *words: str, patience: float = _PATIENCE) -> Answer:
        """Send a request and wait for the answer.

        Args:
            command: A command of files/reader.
            words: Its arguments, any text.
            patience: Seconds to wait; the limit for all answers together applies, too.

        Raises:
            BadSource: The reader ends or does not answer in time.
        """
        begin = time.monotonic()
        self._request(command, words)
        answer = self._answer(begin + min(patience, self._left))
        self._left -= time.monotonic() - begin
        return answer

    def files(self, leave_out: Sequence[str], patience: float) -> Files:
        """Request all files below the mounted root as a tar archive.

        Args:
            leave_out: Paths to exclude, relative to the root.
            patience: Seconds until reading the archive fails.
        """
        self._request("copy", leave_out)
        return Files(self, time.monotonic() + patience)

    def receive(self, buffer: Any, until: float) -> int | Answer:
        """Wait for archive data or for the answer that ends the copy.

        Args:
            buffer: Receives the data.
            until: Deadline on the monotonic clock, in seconds.

        Returns:
            The number of bytes received, or the answer.

        Raises:
            BadSource: Neither comes in time, or the reader ends.
        """
        ready = _ready((self._data, self._control), until)
        if not ready:
            raise self.broken(f"it sent nothing for {_STALL:g} s")
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
            raise BadSource(
                f"its paths are too long: a request of {len(line)} bytes, limit {32 << 10}",
                hint=_HINT,
            )
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
            raise self.broken(f"its answer has {size} bytes, limit {_ANSWER}")
        begin, end = head.end(), head.end() + size
        self._until(lambda: len(self._buffer) >= end or None, deadline)
        text = self._buffer[begin:end].decode(errors="replace")
        del self._buffer[:end]
        return Answer(code == 0, text)

    def _until(self, found: Callable[[], _T | None], deadline: float) -> _T:
        while (result := found()) is None:
            if len(self._buffer) > _ANSWER + 64:
                raise self.broken(f"its answer has more than {_ANSWER} bytes")
            if not _HEAD.match(self._buffer) and len(self._buffer) > 16:
                raise self.broken("its answer is malformed")
            if not _ready((self._control,), deadline):
                raise self.broken("it did not answer in time")
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
        """End the reader, and return an error with the last lines of its kernel or QEMU.

        Args:
            what: The reason, as a clause.
        """
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
        last = "\n".join(f"  {shown(line)}" for line in telling[-6:])
        return BadSource(f"the reader guest failed ({what}); its last lines:\n{last}", hint=_HINT)


class Files(io.RawIOBase):
    """The tar archive that the reader sends, as a stream."""

    def __init__(self, guest: Reader, deadline: float) -> None:
        self._guest, self._deadline = guest, deadline
        self._sent = 0
        self._total: int | None = None
        self.answer: Answer | None = None
        """The messages and status of tar, after its end."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for data and read it into ``buffer``; return 0 at the end of the archive.

        Raises:
            BadSource: The reader stalls, fails, or exceeds its time limit.
        """
        while self._total is None or self._sent < self._total:
            now = time.monotonic()
            if now > self._deadline:
                raise self._guest.broken("the copy exceeded its time limit")
            got = self._guest.receive(buffer, min(self._deadline, now + _STALL))
            if isinstance(got, int):
                self._sent += got
                return got
            if self.answer:
                raise self._guest.broken("it answered twice")
            self.answer = got
            found = _TOTAL.search(got.text)
            # A tar that failed early reports no total; then the archive ends here.
            self._total = int(found[1]) if found else self._sent
        if self._sent > self._total:
            raise self._guest.broken(f"it sent {self._sent} bytes, but reported {self._total}")
        return 0


def _word(text: str) -> str:
    """Encode ``text`` as one word of a request, as an argument of printf(1)'s %b."""
    data = text.encode(errors="surrogateescape") or b"\0"
    return "".join(chr(b) if _PLAIN[b] else f"\\0{b:03o}" for b in data)


def _ready(ends: Sequence[socket.socket], until: float) -> list[socket.socket]:
    """Wait for input on ``ends``; return those that are readable, none at the deadline."""
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    found = dict(poll.poll(max(0, until - time.monotonic()) * 1000))
    return [end for end in ends if end.fileno() in found]
