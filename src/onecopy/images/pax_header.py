"""Parses the extended headers of tar archives: pax, with the keywords of GNU tar, star, libarchive.

Not here: the members (tar_format.py).
"""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse
from collections.abc import Mapping, Sequence

from onecopy.images.acl import ACLS, encode_acl

_DECIMAL = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")
_WHOLE = re.compile(rb"[0-9]{1,20}")
#: Keywords that need no warning. Some are read elsewhere. Others do not affect the unpacked files:
#: access and change times, names of owners (numbers are used), encodings, inode numbers.
_KNOWN = {
    *(b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"SCHILY.devmajor"),
    *(b"SCHILY.devminor", b"atime", b"ctime", b"uname", b"gname", b"comment", b"charset"),
    *(b"hdrcharset", b"LIBARCHIVE.creationtime", b"LIBARCHIVE.symlinktype", b"SCHILY.dev"),
    *(b"SCHILY.ino", b"SCHILY.nlink", b"SCHILY.realsize"),
}
_ATTRIBUTES = ("user.", "trusted.", "security.")


class BadMember(Exception):
    """A member that cannot be read or stored; ``name`` is b"" if the archive itself is at fault."""

    def __init__(self, name: bytes, what: str) -> None:
        super().__init__(what)
        self.name = name
        self.what = what


class Headers:
    """The extended headers that apply to a member."""

    def __init__(self, common: Mapping[bytes, bytes] | None = None) -> None:
        self.records = dict(common or {})
        self.own = False
        self._map: list[bytes] = []

    def add(self, records: Sequence[tuple[bytes, bytes]]) -> None:
        """Apply further records; an empty value removes a keyword."""
        self.own = True
        for key, value in records:
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                self._map.append(value)
            elif value:
                self.records[key] = value
            else:
                self.records.pop(key, None)

    @property
    def name(self) -> bytes:
        """The real name of a sparse file; b"" without one."""
        return self.records.get(b"GNU.sparse.name", b"")

    @property
    def mtime(self) -> int:
        """Modification time in nanoseconds since 1970; raise BadMember."""
        text = self.records[b"mtime"]
        match = _DECIMAL.fullmatch(text)
        if not match:
            raise BadMember(b"", f"its time {text[:40]!r} is malformed")
        value = int(match[2]) * 10**9 + int((match[3] or b"").ljust(9, b"0")[:9])
        return -value if match[1] else value

    @property
    def pieces(self) -> list[tuple[int, int]] | None:
        """The map of a sparse file of format 0.0 or 0.1; raise BadMember."""
        if self._map:
            return parse_map(self._map)
        text = self.records.get(b"GNU.sparse.map")
        return parse_map(text.split(b",")) if text else None

    @property
    def has_map_in_data(self) -> bool:
        """Whether the member is a sparse file of format 1.0; raise BadMember for an unknown one."""
        major, minor = (self.records.get(b"GNU.sparse." + w) for w in (b"major", b"minor"))
        if major is None or major == b"0":
            return False
        if (major, minor) != (b"1", b"0"):
            raise BadMember(b"", "it is a sparse file of an unknown format")
        return True

    @property
    def real_size(self) -> int | None:
        """The size of a sparse file in bytes, holes included."""
        for word in (b"GNU.sparse.realsize", b"GNU.sparse.size"):
            if word in self.records:
                return parse_whole(self.records[word])
        return None

    @property
    def unknown(self) -> list[str]:
        """Keywords that are ignored."""
        return [
            key.decode(errors="backslashreplace")[:80]
            for key in self.records
            if key not in _KNOWN and not key.startswith(b"GNU.sparse.") and not _keeps(key)
        ]

    def attributes(self) -> dict[str, bytes]:
        """Return the member's extended attributes and ACLs (xattr(7)).

        Raises:
            BadMember: An attribute is malformed, unsupported or contradictory.
        """
        found: dict[str, bytes] = {}
        for key, value in self.records.items():
            if not _keeps(key):
                continue
            name, content = _attribute(key.decode(errors="surrogateescape"), value)
            require_whole(name.encode(errors="surrogateescape"))
            if found.setdefault(name, content) != content:
                raise BadMember(b"", f"it has two values for the attribute {name!a}")
        return found


def parse_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """Parse the records of a header, each ``LENGTH KEY=VALUE`` and a newline.

    Raises:
        BadMember: A record is malformed.
    """
    found, at = [], 0
    while at < len(data):
        space = data.find(b" ", at, at + 21)
        length = parse_whole(data[at:space]) if space > at else 0
        record = data[at : at + length]
        key, equals, value = record[space + 1 - at : -1].partition(b"=")
        if len(record) != length or not record.endswith(b"\n") or not equals or not key:
            raise BadMember(b"", "an extended header is malformed")
        if key in (b"path", b"linkpath", b"GNU.sparse.name"):
            require_whole(value)
        found.append((key, value))
        at += length
    return found


def require_whole(name: bytes) -> bytes:
    """Return ``name`` unless it contains a zero byte; raise BadMember."""
    if b"\0" in name:
        raise BadMember(name[:255], "its name contains a zero byte")
    return name


def parse_map(numbers: Sequence[bytes]) -> list[tuple[int, int]]:
    """Parse a sparse file's map of alternating offsets and sizes.

    Returns:
        Pairs of offset and size, in bytes.

    Raises:
        BadMember: The map is malformed.
    """
    if len(numbers) % 2:
        raise BadMember(b"", "its sparse map is incomplete")
    values = [parse_whole(number) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def parse_whole(text: bytes) -> int:
    """Parse a non-negative number below 2**63; raise BadMember."""
    if not _WHOLE.fullmatch(text) or int(text) >= 1 << 63:
        raise BadMember(b"", f"a number in an extended header is invalid: {text[:40]!r}")
    return int(text)


def _keeps(key: bytes) -> bool:
    return b"xattr." in key or key.startswith((b"SCHILY.acl.", b"RHT.security."))


def _attribute(key: str, value: bytes) -> tuple[str, bytes]:
    if key == "RHT.security.selinux":
        return "security.selinux", value.rstrip(b"\0") + b"\0"
    if key in ACLS:
        try:
            return ACLS[key], encode_acl(value.decode())
        except ValueError as error:
            raise BadMember(b"", f"its ACL cannot be stored: {error}") from error
    for prefix in ("SCHILY.xattr.", "LIBARCHIVE.xattr."):
        name = key.removeprefix(prefix)
        if name == key:
            continue
        if prefix == "LIBARCHIVE.xattr.":
            name, value = urllib.parse.unquote(name), _from_base64(name, value)
        if name.startswith(_ATTRIBUTES) or name in ACLS.values():
            return name, value
    raise BadMember(b"", f"its attribute {key[:80]!a} cannot be stored")


def _from_base64(name: str, value: bytes) -> bytes:
    # libarchive omits the padding.
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as error:
        raise BadMember(b"", f"the value of its attribute {name[:80]!a} is malformed") from error
