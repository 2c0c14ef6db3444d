"""POSIX ACLs: as text in archives, and as the kernel has them (acl(5), linux/posix_acl_xattr.h)."""

from __future__ import annotations

import re
import struct

#: pax keyword -> extended attribute.
ACLS = {
    "SCHILY.acl.access": "system.posix_acl_access",
    "SCHILY.acl.default": "system.posix_acl_default",
}
_VERSION = struct.pack("<I", 2)
_NOBODY = 0xFFFFFFFF
#: For one of its own, and for one that is named.
_TAGS = {"user": (1, 2), "group": (4, 8), "mask": (16, None), "other": (32, None)}
_SHORT = {"u": "user", "g": "group", "m": "mask", "o": "other"}
_ENTRY = re.compile(r"(\w+):([^:]*):([r-][w-][xX-])(?::([0-9]{1,10}))?")
_MOST = 4096


def encode_acl(text: str) -> bytes:
    """An ACL of entries like "user:77:r--"; raise ValueError.

    Who is meant by a name is not known here, unless the number stands behind (star does that).
    """
    entries = []
    for line in re.split(r"[,\n]", text):
        entry = line.partition("#")[0].strip()
        if entry:
            entries.append(_entry(entry))
    if not 3 <= len(entries) <= _MOST:
        raise ValueError(f"it has {len(entries)} entries")
    return _VERSION + b"".join(struct.pack("<HHI", *entry) for entry in sorted(entries, key=_order))


def _entry(text: str) -> tuple[int, int, int]:
    match = _ENTRY.fullmatch(text)
    kind = match and _SHORT.get(match[1], match[1])
    if not match or kind not in _TAGS:
        raise ValueError(f"{text[:80]!a} is no entry")
    rights = sum(bit for bit, letter in zip((4, 2, 1), match[3], strict=True) if letter not in "-X")
    own, named = _TAGS[kind]
    if not match[2]:
        return own, rights, _NOBODY
    number = match[4] or match[2]
    if named is None or not re.fullmatch(r"[0-9]{1,10}", number) or int(number) >= _NOBODY:
        raise ValueError(f"{text[:80]!a} names nobody by number: make it with --numeric-owner")
    return named, rights, int(number)


def _order(entry: tuple[int, int, int]) -> tuple[int, int]:
    # The kernel wants them in order of their tags.
    return entry[0], entry[2]
