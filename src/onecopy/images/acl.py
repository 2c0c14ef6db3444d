"""POSIX ACLs: converts the text form in archives to the kernel's binary form.

Source: acl(5); the kernel's include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import re
import struct

#: pax keyword -> extended attribute.
ACLS = {
    "SCHILY.acl.access": "system.posix_acl_access",
    "SCHILY.acl.default": "system.posix_acl_default",
}
_VERSION = struct.pack("<I", 2)
_NO_ID = 0xFFFFFFFF
#: Kind -> tag of the entry for the file's own owner or group, tag of an entry with a name.
_TAGS = {"user": (1, 2), "group": (4, 8), "mask": (16, None), "other": (32, None)}
_SHORT = {"u": "user", "g": "group", "m": "mask", "o": "other"}
_ENTRY = re.compile(r"(\w+):([^:]*):([r-][w-][xX-])(?::([0-9]{1,10}))?")
_MAX_ENTRIES = 4096


def encode_acl(text: str) -> bytes:
    """Convert an ACL of entries like ``user:77:r--`` to the value of its extended attribute.

    A name is resolved only if its number follows in the entry, as star writes it.

    Raises:
        ValueError: An entry is malformed, names no number, or there are too few or too many.
    """
    entries = []
    for line in re.split(r"[,\n]", text):
        entry = line.partition("#")[0].strip()
        if entry:
            entries.append(_entry(entry))
    if not 3 <= len(entries) <= _MAX_ENTRIES:
        raise ValueError(f"it has {len(entries)} entries; the limits are 3 and {_MAX_ENTRIES}")
    return _VERSION + b"".join(struct.pack("<HHI", *entry) for entry in sorted(entries, key=_order))


def _entry(text: str) -> tuple[int, int, int]:
    match = _ENTRY.fullmatch(text)
    kind = match and _SHORT.get(match[1], match[1])
    if not match or kind not in _TAGS:
        raise ValueError(f"{text[:80]!a} is not an ACL entry")
    rights = sum(bit for bit, letter in zip((4, 2, 1), match[3], strict=True) if letter not in "-X")
    own, named = _TAGS[kind]
    if not match[2]:
        return own, rights, _NO_ID
    number = match[4] or match[2]
    if named is None or not re.fullmatch(r"[0-9]{1,10}", number) or int(number) >= _NO_ID:
        raise ValueError(
            f"{text[:80]!a} has no numeric user or group: pack with tar --numeric-owner"
        )
    return named, rights, int(number)


def _order(entry: tuple[int, int, int]) -> tuple[int, int]:
    # The kernel requires entries sorted by tag (posix_acl_valid).
    return entry[0], entry[2]
