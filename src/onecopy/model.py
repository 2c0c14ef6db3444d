"""Values that all packages share: names, references, digests and sizes.

Not here: on-disk formats (store/oci.py) and QEMU's command line (vmm/argv.py).
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from onecopy.errors import InvalidInput

PAGE_SIZE = 4096
#: Segment and RAM sizes are multiples of this so that host and guest can map huge pages.
HUGE_PAGE_SIZE = 2 << 20
MIB = 1 << 20
DEFAULT_VERSION = "latest"

#: Prefixes of lease holders that are not running guests: pinned blobs and saves in progress.
RESERVED = ("pinned-", "saving-")
#: The prefix of the guests' kernel and tools.
_OWN = "onecopy-"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# git abbreviates digests to 7 digits; a much shorter one is more likely a typing error.
_DIGEST = re.compile(r"sha256:[0-9a-f]{6,64}")
# A guest's name becomes its hostname (RFC 1123 label).
_GUEST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SIZE = re.compile(r"0*([0-9]{1,19})([KMGT]?)(i?B)?", re.IGNORECASE)
#: The largest size that the kernel can represent (off_t, loff_t).
_LARGEST = (1 << 63) - 1
_MOST_SHOWN = 1 << 100


def check_name(text: str) -> str:
    """Check that a name is valid for a segment or saved system.

    Returns:
        ``text``, unchanged.

    Raises:
        InvalidInput: the name is not valid.
    """
    if not _NAME.fullmatch(text):
        raise InvalidInput(
            f"{_short(text)} is not a valid name",
            hint="use 1-63 of a-z 0-9 . _ - and begin and end with a letter or digit",
        )
    return text


def check_new_name(text: str) -> None:
    """Refuse a name with the prefix that onecopy reserves for itself.

    Raises:
        InvalidInput: the name begins with the reserved prefix.
    """
    if text.startswith(_OWN):
        raise InvalidInput(
            f"{text!r} is reserved: names that begin with {_OWN} belong to onecopy",
            hint="choose another name",
        )


def check_guest_name(text: str) -> str:
    """Check that a name is valid for a guest, as a hostname label.

    Returns:
        ``text``, unchanged.

    Raises:
        InvalidInput: the name is not valid.

    Source:
        RFC 1123, section 2.1.
    """
    if not _GUEST.fullmatch(text):
        raise InvalidInput(
            f"{_short(text)} is not a valid guest name",
            hint="use 1-63 of a-z 0-9 - and begin and end with a letter or digit",
        )
    if text.startswith(RESERVED):
        raise InvalidInput(
            f"{text!r} is not a valid guest name: onecopy reserves the prefixes "
            f"{', '.join(RESERVED)}",
            hint="choose a name with another prefix",
        )
    return text


def in_order(text: str) -> tuple[tuple[tuple[str, tuple[int, str]], ...], str]:
    """Return a sort key for natural order, which puts web-2 before web-10."""
    parts = re.split("([0-9]+)", text)
    # No int() here: names of external guests may be of any length.
    numbers = [(len(n.lstrip("0")), n.lstrip("0")) for n in (*parts[1::2], "")]
    return tuple(zip(parts[::2], numbers, strict=True)), text


class Mergeable(StrEnum):
    """Which memory of a guest KSM may merge."""

    NONE = "none"
    RAM = "ram"
    """The guest's RAM."""
    ALL = "all"
    """Also QEMU's own memory; a QEMU that exec starts then has no address randomisation."""


class PageClass(StrEnum):
    """How a range of a segment is mapped, named after z/VM's page descriptor codes.

    The first letter says how many copies there are: S for one shared by all guests, E for one per
    guest. The second letter says what guests may do with it.

    Source:
        z/VM CP Commands and Utilities Reference, DEFSEG.
    """

    SR = "SR"
    """Shared read-only: guests map the stored blob itself."""
    ER = "ER"
    """Exclusive read-only: each guest has its own copy in memory."""
    SW = "SW"
    """Shared read-write: one copy for all current users, dropped with the last of them."""
    EW = "EW"
    """Exclusive read-write: copy-on-write of the stored blob."""
    SN = "SN"
    """Like SW, without saved content: initially zero."""
    EN = "EN"
    """Like EW, without saved content: initially zero."""
    SC = "SC"
    """Shared read-only for guests, writable by the host."""

    @property
    def shared(self) -> bool:
        """Whether all guests share one copy."""
        return self.value[0] == "S"

    @property
    def saved(self) -> bool:
        """Whether the range has stored content."""
        return self.value[1] != "N"

    @property
    def writable(self) -> bool:
        """Whether guests may write to the range."""
        return self.value[1] in "WN"


class Reference(msgspec.Struct, frozen=True):
    """A reference to one artifact: ``NAME[:VERSION]`` or ``NAME@sha256:HEX``.

    HEX may be shortened to 6 digits or more if that is unique among digests of the name.
    """

    name: str
    version: str = DEFAULT_VERSION
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse a reference.

        Raises:
            InvalidInput: the name, version or digest is not valid.
        """
        name, at, digest = text.partition("@")
        if at:
            if not _DIGEST.fullmatch(digest):
                raise InvalidInput(
                    f"{_short(digest)} is not a valid digest",
                    hint="a digest is sha256: and 6 to 64 hexadecimal digits (0-9 a-f); `onecopy "
                    "ls` shows them",
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
    """Parse ``SEGMENT`` or ``SEGMENT:/MOUNTPOINT``.

    Returns:
        The reference, and the mount point or "" if there is none.

    Raises:
        InvalidInput: the reference is not valid or is missing.
    """
    ref, slash, mountpoint = text.rpartition(":/")
    if not slash:
        return Reference.parse(text), ""
    if not ref:
        raise InvalidInput(
            f"{text!r} does not name the segment to mount",
            hint="write SEGMENT:/MOUNTPOINT, for example data:/srv/data",
        )
    return Reference.parse(ref), "/" + mountpoint.rstrip("/")


def require_text(text: str) -> str:
    """Check that a text is valid UTF-8, which the guest agent requires.

    Returns:
        ``text``, unchanged.

    Raises:
        InvalidInput: the text contains bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{_short(text)} is not UTF-8, which the guest agent requires",
            hint="match the name with a pattern in the guest: onecopy exec GUEST -- sh -c 'cat "
            "/srv/*'",
        ) from error
    return text


def check_ports(host: int, guest: int) -> tuple[int, int]:
    """Check a port of the host (0 for any free port) and a port of a guest.

    Returns:
        Both ports, unchanged.

    Raises:
        InvalidInput: a port is out of range.
    """
    if not (0 <= host < 65536 and 0 < guest < 65536):
        raise InvalidInput(
            f"{host}:{guest} is not a valid pair of ports", hint="a port is 1 to 65535"
        )
    return host, guest


def parse_size(text: str) -> int:
    """Parse a size such as ``256M``, ``1G`` or ``65536``, in binary units.

    Returns:
        The size in bytes.

    Raises:
        InvalidInput: the text is not a size or exceeds 8 EiB.
    """
    match = _SIZE.fullmatch(text.strip())
    size = match and int(match[1]) << _SHIFTS[match[2].upper()]
    if size is None or size > _LARGEST:
        raise InvalidInput(
            f"{_short(text)} is not a valid size",
            hint="write for example 256M or 1G; at most 8 EiB",
        )
    return size


_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _short(text: str) -> str:
    """Quote a text for an error message, shortened to 80 characters."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def format_size(size: int) -> str:
    """Format a number of bytes in binary units, such as ``1.5 GiB``."""
    # A record may hold a number that is too large for a float.
    value = float(max(-_MOST_SHOWN, min(size, _MOST_SHOWN)))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def align_up(size: int, to: int = HUGE_PAGE_SIZE) -> int:
    """Round ``size`` up to a multiple of ``to``, both in bytes."""
    return -(-size // to) * to
