"""tar archives as they come, member by member: old ones, ustar, pax, and GNU's.

Nothing is guessed and nothing passed over in silence: what cannot be read is refused, with the
member's name, and what is not read is told. No archive takes more memory than its largest header.
POSIX.1-2017 pax, GNU tar's manual ("Basic Tar Format", "Sparse Formats"). Not here: what pax
headers say (pax_header.py), writing the members anywhere (unpack.py).
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
#: Bytes of one extended header: names, attributes, a sparse file's map.
_MOST_HEADER = 4 << 20
#: Extended headers in a row, with no member.
_MOST_IN_A_ROW = 16
#: name mode uid gid size mtime checksum type link magic+version uname gname major minor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_NUMBER = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
#: How tar calls what, and how we do, as ls(1).
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
_LEFT_OUT = {b"V": "labels of volumes", b"D": "lists of a dump's folders"}


class Member(msgspec.Struct, frozen=True):
    """A member's header."""

    name: bytes
    """As it is written."""
    kind: str
    """``-`` file, ``d`` folder, ``l`` link, ``h`` hard link, ``c`` ``b`` device, ``p`` pipe."""
    mode: int
    uid: int
    gid: int
    size: int
    """Bytes that the file has."""
    stored: int
    """Bytes of it in the archive."""
    mtime: int
    """Nanoseconds since 1970."""
    target: bytes = b""
    device: int = 0
    attributes: dict[str, bytes] = {}
    pieces: list[tuple[int, int]] | None = None
    """Of a sparse file: offset and size of what is stored; the rest is holes."""


class Stream(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer at its end only."""
        ...


class TarReader:
    """The members of an archive, in order."""

    def __init__(self, stream: Stream, left_out: Callable[[str, bytes], None]) -> None:
        """``left_out`` is told what is not read, and of which member."""
        self._stream = stream
        self._left_out = left_out
        self._begun = False
        #: Of the present member's data, and of what fills its last block.
        self._left = self._filling = 0
        self._common = Headers()

    def next(self) -> Member | None:
        """The next member, or None at the archive's end; raise BadMember."""
        self._skip()
        own = Headers(self._common.records)
        names: dict[bytes, bytes] = {}
        for _ in range(_MOST_IN_A_ROW):
            block = self._block()
            if block == _ZERO:
                if own.own or names:
                    raise BadMember(b"", "it ends after the header of a member that is not there")
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
                self._left_out(_LEFT_OUT[kind], fields[0].rstrip(b"\0"))
                self._begin(size)
                self._skip()
            else:
                return self._member(block, fields, own, names)
        raise BadMember(b"", f"it has {_MOST_IN_A_ROW} headers in a row, and no member")

    def read(self, size: int) -> bytes:
        """The next bytes of the present member; b"" after the last. Raises BadMember."""
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
        # In GNU's headers something else stands where others have the rest of the name.
        start = fields[14].partition(b"\0")[0] if fields[9][:6] == b"ustar\0" else b""
        name = fields[0].partition(b"\0")[0]
        name = names.get(b"L", start + b"/" + name if start else name)
        name = headers.name or headers.records.get(b"path", name)
        try:
            member = _plain(name, fields, headers, names)
            size, kind = member.stored, fields[7]
            if kind in b"123456":
                # Whatever size they tell: they have no data (as GNU tar, and Python's tarfile).
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
                self._left_out(_LEFT_OUT[kind], name)
        except BadMember as error:
            raise BadMember(error.name or name, error.what) from error
        return member

    def _fields(self, block: bytes) -> tuple[bytes, ...]:
        fields = _HEADER.unpack(block)
        if not _is_right(block, fields[6]):
            if not self._begun:
                raise BadMember(b"", "it does not look like a tar archive")
            raise BadMember(b"", "there is no header where the next member should begin")
        self._begun = True
        return fields

    def _begin(self, size: int) -> None:
        if size < 0:
            raise BadMember(b"", f"its size is {size}")
        self._left, self._filling = size, -size % _BLOCK

    def _header(self, size: int) -> bytes:
        if size > _MOST_HEADER:
            raise BadMember(b"", f"a header has {size} bytes, more than {_MOST_HEADER}")
        self._begin(size)
        data = b""
        while self._left:
            data += self.read(self._left)
        self._skip()
        return data

    def _skip(self) -> None:
        """Go to the end of the present member's data."""
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
            raise BadMember(b"", "it does not look like a tar archive")
        raise _cut()

    def _require_end(self) -> None:
        # One block of zeroes is as good: nothing can follow it.
        while data := self._stream.read(1 << 20):
            if data.count(0) != len(data):
                raise BadMember(
                    b"", "something follows its end: another archive that was put behind it?"
                )

    def _old_map(self, block: bytes) -> list[tuple[int, int]]:
        """The map of GNU's old format, in the header and in blocks behind it."""
        pieces, more = _entries(block[386:482]), block[482]
        while more:
            block = self._block()
            pieces += _entries(block[:504])
            more = block[504]
            if len(pieces) * 24 > _MOST_HEADER:
                raise BadMember(b"", "its sparse map is too long")
        return pieces

    def _map_in_data(self) -> list[tuple[int, int]]:
        """The map of GNU's format 1.0: lines of numbers, filled up to whole blocks."""
        lines: list[bytes] = []
        rest, count, read = b"", 1, 0
        while len(lines) < count:
            block = self.read(_BLOCK)
            read += len(block)
            if len(block) < _BLOCK or read > _MOST_HEADER:
                raise BadMember(b"", "its sparse map is too long, or broken off")
            *whole, rest = (rest + block).split(b"\n")
            lines += whole
            if lines:
                count = 1 + 2 * parse_whole(lines[0])
        return parse_map(lines[1:count])


def _plain(
    name: bytes, fields: tuple[bytes, ...], headers: Headers, names: dict[bytes, bytes]
) -> Member:
    """The member, but for holes."""
    kind = _KINDS.get(fields[7])
    if kind is None:
        raise BadMember(b"", f"it is of a kind ({fields[7].decode('latin-1')!r}) that is not known")
    records = headers.records
    size = parse_whole(records[b"size"]) if b"size" in records else _number(fields[4])
    if kind == "-" and name.endswith(b"/"):
        # Before POSIX a folder was a file with such a name.
        if size:
            raise BadMember(b"", "it is a folder by its name, but has content")
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
    # Linux's own limits (include/linux/kdev_t.h).
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise BadMember(b"", f"Linux has no device {major}, {minor}")
    return os.makedev(major, minor)


def _sparse(member: Member, pieces: list[tuple[int, int]], real: int | None, stored: int) -> Member:
    end = 0
    for offset, size in pieces:
        if offset < end or size < 0:
            raise BadMember(b"", "its sparse map goes back")
        end = offset + size
    if real is None or end > real or sum(size for _, size in pieces) != stored:
        raise BadMember(b"", "its sparse map does not fit its size")
    return replace(member, size=real, stored=stored, pieces=pieces)


def _is_right(block: bytes, told: bytes) -> bool:
    """Whether the header's checksum is right; old tars took bytes for signed."""
    match = _NUMBER.fullmatch(told)
    if not match or not match[1]:
        return False
    found = sum(block) - sum(told) + 8 * 0x20
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
    """A number of a header: octal digits, or base 256 (GNU, star)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False)
        bits = 8 * len(field)
        # 0xff in front is a sign, 0x80 is not.
        value = value - (1 << bits) if field[0] == 0xFF else value & ((1 << bits - 1) - 1)
        if not -(1 << 63) <= value < 1 << 63:
            raise BadMember(b"", f"a number in its header is too large: {value}")
        return value
    match = _NUMBER.fullmatch(field)
    if not match:
        raise BadMember(b"", f"a number in its header is none: {field!r}")
    return int(match[1] or b"0", 8)


def _id(value: int) -> int:
    # -1 means nobody (chown(2)).
    if not 0 <= value < (1 << 32) - 1:
        raise BadMember(b"", f"there can be no owner {value}")
    return value


def _cut() -> BadMember:
    return BadMember(b"", "it ends without its end mark, so it was cut off")
