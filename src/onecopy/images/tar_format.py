"""Reads tar archives as a stream, member by member: v7, ustar, pax and GNU formats.

The reader never guesses. It refuses what it cannot read, with the member's name, and reports what
it skips. It needs no more memory than the largest header. Not here: pax headers (pax_header.py),
writing the members (unpack.py).

Source: POSIX.1-2017 pax; GNU tar's manual, "Basic Tar Format" and "Sparse Formats".
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec.structs import replace

from onecopy.images.pax_header import (
    BadMember,
    Headers,
    parse_map,
    parse_records,
    parse_whole,
    require_whole,
)

_BLOCK = 512
_ZERO = bytes(_BLOCK)
#: The largest extended header in bytes: names, attributes, a sparse file's map.
_MAX_HEADER = 4 << 20
#: The most extended headers in front of a member.
_MAX_HEADERS = 16
#: name mode uid gid size mtime checksum type link magic+version uname gname major minor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_NUMBER = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
#: Type flag of tar -> letter of ls(1); "h" for a hard link.
_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7", b"S"), "-"),
    b"1": "h",
    b"2": "l",
    b"3": "c",
    b"4": "b",
    b"5": "d",
    b"6": "p",
    b"D": "d",
}
_SKIPPED = {b"V": "volume labels", b"D": "directory lists of incremental dumps"}


class Member(msgspec.Struct, frozen=True):
    """A member's header."""

    name: bytes
    """The name as it stands in the archive."""
    kind: str
    """``-`` file, ``d`` directory, ``l`` link, ``h`` hard link, ``c`` ``b`` device, ``p`` FIFO."""
    mode: int
    uid: int
    gid: int
    size: int
    """Bytes of the file."""
    stored: int
    """Bytes of the file's data in the archive."""
    mtime: int
    """Nanoseconds since 1970."""
    target: bytes = b""
    """Target of a link."""
    device: int = 0
    """Device number, as of `os.makedev`."""
    attributes: dict[str, bytes] = {}
    """Extended attributes."""
    pieces: list[tuple[int, int]] | None = None
    """For a sparse file: offset and size of each stored range; the rest is holes."""


class Stream(Protocol):
    """A stream that an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """Read ``size`` bytes; fewer only at the end."""
        ...


class TarReader:
    """The members of an archive, in order."""

    def __init__(self, stream: Stream, left_out: Callable[[str, bytes], None]) -> None:
        """Read from ``stream``; call ``left_out`` with the kind and name of each skipped item."""
        self._stream = stream
        self._left_out = left_out
        self._begun = False
        #: Unread bytes of the current member's data, and of the padding behind it.
        self._left = self._filling = 0
        self._common = Headers()

    def next(self) -> Member | None:
        """Return the next member; None at the end of the archive.

        Raises:
            BadMember: The archive is damaged or has an unsupported feature.
        """
        self._skip()
        own = Headers(self._common.records)
        names: dict[bytes, bytes] = {}
        for _ in range(_MAX_HEADERS):
            block = self._block()
            if block == _ZERO:
                if own.own or names:
                    raise BadMember(b"", "it ends after an extended header, without its member")
                self._require_end()
                return None
            fields = self._fields(block)
            kind, size = fields[7], _number(fields[4])
            if kind in (b"x", b"g"):
                records = parse_records(self._header(size))
                (own if kind == b"x" else self._common).add(records)
                if kind == b"g":
                    own = Headers(self._common.records)
            elif kind in (b"L", b"K"):
                names[kind] = require_whole(self._header(size).rstrip(b"\0"))
            elif kind == b"V":
                self._left_out(_SKIPPED[kind], fields[0].rstrip(b"\0"))
                self._begin(size)
                self._skip()
            else:
                return self._member(block, fields, own, names)
        raise BadMember(b"", f"it has {_MAX_HEADERS} extended headers in a row without a member")

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes of the current member's data; return b"" at its end.

        Raises:
            BadMember: The archive is truncated.
        """
        data = self._stream.read(min(size, self._left))
        if not data and size and self._left:
            raise _cut()
        self._left -= len(data)
        return data

    def _member(
        self,
        block: bytes,
        fields: tuple[bytes, ...],
        headers: Headers,
        names: dict[bytes, bytes],
    ) -> Member:
        # Only ustar headers have a name prefix. GNU headers hold other fields there.
        start = fields[14].partition(b"\0")[0] if fields[9][:6] == b"ustar\0" else b""
        name = fields[0].partition(b"\0")[0]
        name = names.get(b"L", start + b"/" + name if start else name)
        name = headers.name or headers.records.get(b"path", name)
        try:
            member = _plain(name, fields, headers, names)
            size, kind = member.stored, fields[7]
            if kind in b"123456":
                # Links and devices have no data, whatever their size says (as in GNU tar).
                size, member = 0, replace(member, size=0, stored=0)
            pieces = self._old_map(block) if kind == b"S" else headers.pieces
            self._begin(size)
            if headers.has_map_in_data:
                pieces = self._map_in_data()
            if pieces is not None:
                real = _number(block[483:495]) if kind == b"S" else headers.real_size
                member = _sparse(member, pieces, real, self._left)
            for word in headers.unknown:
                self._left_out(f"pax keyword {word}", name)
            if kind == b"D":
                self._left_out(_SKIPPED[kind], name)
        except BadMember as error:
            raise BadMember(error.name or name, error.what) from error
        return member

    def _fields(self, block: bytes) -> tuple[bytes, ...]:
        fields = _HEADER.unpack(block)
        if not _is_valid(block, fields[6]):
            if not self._begun:
                raise BadMember(b"", "it is not a tar archive")
            raise BadMember(b"", "the header of the next member is invalid")
        self._begun = True
        return fields

    def _begin(self, size: int) -> None:
        if size < 0:
            raise BadMember(b"", f"its size is {size}")
        self._left, self._filling = size, -size % _BLOCK

    def _header(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise BadMember(b"", f"an extended header has {size} bytes; the limit is {_MAX_HEADER}")
        self._begin(size)
        data = b""
        while self._left:
            data += self.read(self._left)
        self._skip()
        return data

    def _skip(self) -> None:
        """Skip the rest of the current member's data and padding."""
        while self._left:
            self.read(1 << 20)
        if self._filling:
            if len(self._stream.read(self._filling)) < self._filling:
                raise _cut()
            self._filling = 0

    def _block(self) -> bytes:
        block = self._stream.read(_BLOCK)
        if len(block) == _BLOCK:
            return block
        if not self._begun:
            raise BadMember(b"", "it is not a tar archive")
        raise _cut()

    def _require_end(self) -> None:
        # POSIX requires two blocks of zeroes. One is accepted, as nothing may follow it.
        while data := self._stream.read(1 << 20):
            if data.count(0) != len(data):
                raise BadMember(b"", "it has data after its end, perhaps a second archive")

    def _old_map(self, block: bytes) -> list[tuple[int, int]]:
        """Read the sparse map of GNU's old format, in the header and the blocks behind it."""
        pieces, more = _entries(block[386:482]), block[482]
        while more:
            block = self._block()
            pieces += _entries(block[:504])
            more = block[504]
            if len(pieces) * 24 > _MAX_HEADER:
                raise BadMember(b"", f"its sparse map has more than {_MAX_HEADER} bytes")
        return pieces

    def _map_in_data(self) -> list[tuple[int, int]]:
        """Read the sparse map of GNU's format 1.0: lines of numbers, padded to whole blocks."""
        lines: list[bytes] = []
        rest, count, read = b"", 1, 0
        while len(lines) < count:
            block = self.read(_BLOCK)
            read += len(block)
            if len(block) < _BLOCK or read > _MAX_HEADER:
                raise BadMember(
                    b"", f"its sparse map is incomplete or has more than {_MAX_HEADER} bytes"
                )
            *whole, rest = (rest + block).split(b"\n")
            lines += whole
            if lines:
                count = 1 + 2 * parse_whole(lines[0])
        return parse_map(lines[1:count])


def _plain(
    name: bytes, fields: tuple[bytes, ...], headers: Headers, names: dict[bytes, bytes]
) -> Member:
    """Return the member, without the map of a sparse file."""
    kind = _KINDS.get(fields[7])
    if kind is None:
        raise BadMember(b"", f"its type {fields[7].decode('latin-1')!r} is unknown")
    records = headers.records
    size = parse_whole(records[b"size"]) if b"size" in records else _number(fields[4])
    if kind == "-" and name.endswith(b"/"):
        # In v7 archives a directory is a file whose name ends with a slash.
        if size:
            raise BadMember(b"", f"its name is a directory's, but it has {size} bytes of data")
        kind = "d"
    target = names.get(b"K", fields[8].partition(b"\0")[0])
    return Member(
        name=name,
        kind=kind,
        mode=_number(fields[1]) & 0o7777,
        uid=_id(parse_whole(records[b"uid"]) if b"uid" in records else _number(fields[2])),
        gid=_id(parse_whole(records[b"gid"]) if b"gid" in records else _number(fields[3])),
        size=size,
        stored=size,
        mtime=headers.mtime if b"mtime" in records else _number(fields[5]) * 10**9,
        target=records.get(b"linkpath", target) if kind in "lh" else b"",
        device=_device(headers, fields) if kind in "cb" else 0,
        attributes=headers.attributes(),
    )


def _device(headers: Headers, fields: tuple[bytes, ...]) -> int:
    records = headers.records
    major, minor = (
        parse_whole(records[word]) if word in records else _number(field)
        for word, field in ((b"SCHILY.devmajor", fields[12]), (b"SCHILY.devminor", fields[13]))
    )
    # Linux has 12 bits for the major number and 20 for the minor (include/linux/kdev_t.h).
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise BadMember(b"", f"its device number {major}, {minor} is out of Linux's range")
    return os.makedev(major, minor)


def _sparse(member: Member, pieces: list[tuple[int, int]], real: int | None, stored: int) -> Member:
    end = 0
    for offset, size in pieces:
        if offset < end or size < 0:
            raise BadMember(b"", "its sparse map is not in ascending order")
        end = offset + size
    if real is None or end > real or sum(size for _, size in pieces) != stored:
        raise BadMember(b"", "its sparse map does not match its size")
    return replace(member, size=real, stored=stored, pieces=pieces)


def _is_valid(block: bytes, checksum: bytes) -> bool:
    """Check a header's checksum; old tar programs summed bytes as signed numbers."""
    match = _NUMBER.fullmatch(checksum)
    if not match or not match[1]:
        return False
    found = sum(block) - sum(checksum) + 8 * 0x20
    if int(match[1], 8) == found:
        return True
    return int(match[1], 8) == found - 256 * sum(b > 127 for b in block[:148] + block[156:])


def _entries(data: bytes) -> list[tuple[int, int]]:
    pairs = (
        (_number(data[at : at + 12]), _number(data[at + 12 : at + 24]))
        for at in range(0, len(data) - 23, 24)
    )
    return [pair for pair in pairs if pair != (0, 0)]


def _number(field: bytes) -> int:
    """Parse a number of a header: octal digits, or base 256 as in GNU tar and star."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False)
        bits = 8 * len(field)
        # A leading 0xff marks a negative number, and 0x80 a positive one.
        value = value - (1 << bits) if field[0] == 0xFF else value & ((1 << bits - 1) - 1)
        if not -(1 << 63) <= value < 1 << 63:
            raise BadMember(b"", f"a number in its header is too large: {value}")
        return value
    match = _NUMBER.fullmatch(field)
    if not match:
        raise BadMember(b"", f"a number in its header is malformed: {field!r}")
    return int(match[1] or b"0", 8)


def _id(value: int) -> int:
    # chown(2) takes -1 as "leave unchanged".
    if not 0 <= value < (1 << 32) - 1:
        raise BadMember(b"", f"its owner {value} is out of range")
    return value


def _cut() -> BadMember:
    return BadMember(b"", "it is truncated: it ends without its end mark")
