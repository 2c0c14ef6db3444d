"""The values that every room speaks of: names, references, digests and sizes.

Not here: what lies on disk (store/oci.py) or how QEMU is told (vmm/argv.py).
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from onecopy.errors import InvalidInput

PAGE_SIZE = 4096
#: Segments and RAM are multiples of this, so that host and guest may map them in huge pages.
HUGE_PAGE_SIZE = 2 << 20
MIB = 1 << 20
DEFAULT_VERSION = "latest"

#: How holders begin that are no guests, or not yet: pinned blobs, what is about to be saved.
RESERVED = ("pinned-", "saving-")
#: How kernel and tools of guests begin.
_OWN = "onecopy-"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# What git shows of its digests is 7 digits; less is more often a slip than meant.
_DIGEST = re.compile(r"sha256:[0-9a-f]{6,64}")
# A guest's name becomes its hostname (RFC 1123 label).
_GUEST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SIZE = re.compile(r"0*([0-9]{1,19})([KMGT]?)(i?B)?", re.IGNORECASE)
#: What the kernel can count in a file, or in memory (off_t, loff_t).
_LARGEST = (1 << 63) - 1
_MOST_SHOWN = 1 << 100


def check_name(text: str) -> str:
    """Return ``text`` if it can name a segment or saved system; raise InvalidInput."""
    if not _NAME.fullmatch(text):
        raise InvalidInput(
            f"{_short(text)} is not a valid name",
            hint="use 1-63 of a-z 0-9 . _ - and begin and end with a letter or digit",
        )
    return text


def check_new_name(text: str) -> None:
    """Raise InvalidInput for a name that only onecopy itself gives."""
    if text.startswith(_OWN):
        raise InvalidInput(
            f"{text!r} cannot be given: names that begin with {_OWN} are onecopy's own",
            hint="choose another name",
        )


def check_guest_name(text: str) -> str:
    """Return ``text`` if it can name a guest (a hostname label); raise InvalidInput."""
    if not _GUEST.fullmatch(text):
        raise InvalidInput(
            f"{_short(text)} is not a valid guest name",
            hint="use 1-63 of a-z 0-9 - and begin and end with a letter or digit",
        )
    if text.startswith(RESERVED):
        raise InvalidInput(
            f"{text!r} is not a valid guest name: onecopy itself uses {', '.join(RESERVED)}",
            hint="begin it with something else",
        )
    return text


def in_order(text: str) -> tuple[tuple[tuple[str, tuple[int, str]], ...], str]:
    """A key by which names are sorted as people count: web-2 before web-10."""
    parts = re.split("([0-9]+)", text)
    # Not int(): foreign guests may have names of any length.
    numbers = [(len(n.lstrip("0")), n.lstrip("0")) for n in (*parts[1::2], "")]
    return tuple(zip(parts[::2], numbers, strict=True)), text


class Mergeable(StrEnum):
    """What of a guest KSM may merge."""

    NONE = "none"
    RAM = "ram"
    """The guest's own pages."""
    ALL = "all"
    """Also what QEMU itself keeps in memory, which then goes without address randomisation."""


class PageClass(StrEnum):
    """How a range of a segment is mapped, in z/VM's terms (page descriptor codes).

    The first letter is S (all guests have one copy) or E (each has its own), the second what
    guests may do with it.
    """

    SR = "SR"
    """Shared, read-only: the stored blob itself."""
    ER = "ER"
    """Exclusive, read-only: each guest has a copy in memory of its own."""
    SW = "SW"
    """Shared, writable: one copy for all present users, which ends with the last of them."""
    EW = "EW"
    """Exclusive, writable: copy-on-write of the stored blob."""
    SN = "SN"
    """As SW, but not saved: zeroes at first."""
    EN = "EN"
    """As EW, but not saved: zeroes at first."""
    SC = "SC"
    """Shared: the host writes, guests read."""

    @property
    def shared(self) -> bool:
        """Whether guests see one copy."""
        return self.value[0] == "S"

    @property
    def saved(self) -> bool:
        """Whether it has stored content."""
        return self.value[1] != "N"

    @property
    def writable(self) -> bool:
        """Whether guests may write to it."""
        return self.value[1] in "WN"


class Reference(msgspec.Struct, frozen=True):
    """What a user types to mean one artifact: ``NAME[:VERSION]`` or ``NAME@sha256:HEX``.

    Of HEX the first 6 digits are enough, or as many as tell it from others of that name.
    """

    name: str
    version: str = DEFAULT_VERSION
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse what a user typed; raise InvalidInput."""
        name, at, digest = text.partition("@")
        if at:
            if not _DIGEST.fullmatch(digest):
                raise InvalidInput(
                    f"{_short(digest)} is not a valid digest",
                    hint="a digest is sha256: and 6 to 64 hexadecimal digits (0-9 a-f); "
                    "`onecopy ls` shows them",
                )
            return cls(check_name(name), digest=digest)
        name, colon, version = text.partition(":")
        if colon and not _VERSION.fullmatch(version):
            raise InvalidInput(
                f"{_short(version)} is not a valid version",
                hint="use 1-128 of A-Z a-z 0-9 . _ - and begin with a letter, digit or _",
            )
        return cls(check_name(name), version or DEFAULT_VERSION)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.version}"


def parse_mount(text: str) -> tuple[Reference, str]:
    """``SEGMENT`` or ``SEGMENT:/MOUNTPOINT``; "" where it is not mounted. Raises InvalidInput."""
    ref, slash, mountpoint = text.rpartition(":/")
    if not slash:
        return Reference.parse(text), ""
    if not ref:
        raise InvalidInput(
            f"{text!r} does not say which segment to mount",
            hint="write for example data:/srv/data",
        )
    return Reference.parse(ref), "/" + mountpoint.rstrip("/")


def require_text(text: str) -> str:
    """Return what can be told to a guest; raise InvalidInput for what came as other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{_short(text)} is not UTF-8, and the guest agent takes nothing else",
            hint="name it in the guest by a pattern: onecopy exec GUEST -- sh -c 'cat /srv/*'",
        ) from error
    return text


def check_ports(host: int, guest: int) -> tuple[int, int]:
    """A port of the host, 0 for any, and one of a guest; raise InvalidInput."""
    if not (0 <= host < 65536 and 0 < guest < 65536):
        raise InvalidInput(f"{host}:{guest} is not a port pair", hint="ports are 1 to 65535")
    return host, guest


def parse_size(text: str) -> int:
    """Bytes meant by ``256M``, ``1G``, ``65536``; raise InvalidInput."""
    match = _SIZE.fullmatch(text.strip())
    size = match and int(match[1]) << _SHIFTS[match[2].upper()]
    if size is None or size > _LARGEST:
        raise InvalidInput(
            f"{_short(text)} is not a size", hint="write for example 256M or 1G; at most 8 EiB"
        )
    return size


_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _short(text: str) -> str:
    """``text`` for an error: of 5,000 digits the first ones tell enough."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def format_size(size: int) -> str:
    """``size`` bytes for a reader, in binary units: ``1.5 GiB``."""
    # What a record says may be more than a float holds.
    value = float(max(-_MOST_SHOWN, min(size, _MOST_SHOWN)))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def align_up(size: int, to: int = HUGE_PAGE_SIZE) -> int:
    """The smallest multiple of ``to`` that is not below ``size`` (both bytes)."""
    return -(-size // to) * to
