"""Whom QEMU runs as when root starts it: a user of its own for each guest.

The number is all there is of that user: no name, no files but the guest's, no record that could go
stale. Not here: what else QEMU may not (confine.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec

from onecopy.linux.files import ROOT, read_number
from onecopy.linux.process import capabilities
from onecopy.linux.syscall import become, set_capabilities
from onecopy.vmm.free_uids import MANY, unused

#: Numbers that nothing else gives out (systemd docs/UIDS-GIDS.md): for guests that are closed to
#: this host (closed_network.py), and for those that may reach it.
CLOSED, OPEN = range(0x70000000, 0x78000000), range(0x78000000, 0x7F000000)
#: Numbers that nothing but guests has.
GUESTS = range(CLOSED.start, OPEN.stop)
#: Those of systemd's dynamic users, where there are no others.
_SHARED = range(61184, 65520)
KVM = Path("/dev/kvm")

_BIND_SERVICE = 1 << 10  # CAP_NET_BIND_SERVICE
#: CAP_CHOWN, CAP_SETGID, CAP_SETUID: what it takes to hand a process and its files to someone else.
_NEEDED = 1 << 0 | 1 << 6 | 1 << 7


class User(msgspec.Struct, frozen=True):
    """A user (and group) number, and the groups it needs besides."""

    id: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, pid: int, root: Path = ROOT) -> User | None:
        """The user of a process; None if it is gone."""
        with contextlib.suppress(OSError):
            status = (root / f"proc/{pid}/status").read_text()
            if found := re.search(r"^Uid:\s+\d+\s+(\d+)", status, re.MULTILINE):
                return cls(int(found[1]))
        return None

    def own(self, file: int | Path) -> None:
        """Make a file this user's."""
        os.chown(file, self.id, self.id)

    def become(self, capabilities: int = 0) -> None:
        """Let this thread be the user, with no more than ``capabilities``; raise OSError."""
        become(self.id, self.id, self.groups)
        set_capabilities(capabilities)


def new_user(accel: str, *, allow_host: bool = False) -> User | None:
    """A user for one new guest; None if it has to run as whoever starts it."""
    if os.geteuid() != 0 or why_not(accel):
        return None
    usable = _usable_range(wanted=OPEN if allow_host else CLOSED)
    return User(unused(usable), _groups(accel))


def why_not(accel: str, root: Path = ROOT) -> str:
    """What keeps root from running guests as users of their own; "" if nothing does."""
    if not _usable_range(root):
        return "this container has no user numbers for guests"
    if capabilities(root) & _NEEDED != _NEEDED:
        return "this root may not become another user"
    if accel == "kvm" and not _may_use_kvm(KVM.stat()):
        return "/dev/kvm belongs to no group that may use it"
    return ""


def have_own_numbers(root: Path = ROOT) -> bool:
    """Whether guests get numbers that are nobody else's, by which rules can tell them."""
    return os.geteuid() == 0 and not why_not("tcg", root) and _usable_range(root) == CLOSED


def few(root: Path = ROOT) -> int:
    """How many numbers there are for guests, if they are few; else 0."""
    count = len(_usable_range(root))
    return count if count < MANY else 0


def port_capabilities(ports: Iterable[int], root: Path = ROOT) -> int:
    """What it takes to publish ``ports`` of the host, as far as we have it (ip(7))."""
    first = read_number(root / "proc/sys/net/ipv4/ip_unprivileged_port_start")
    low = any(0 < port < (1024 if first is None else first) for port in ports)
    return _BIND_SERVICE & capabilities(root) if low else 0


def _usable_range(root: Path = ROOT, wanted: range = CLOSED) -> range:
    """``wanted``, or what exists of others in this user namespace (user_namespaces(7)), if any."""
    maps = [(root / f"proc/self/{name}").read_text() for name in ("uid_map", "gid_map")]
    for each in (wanted, _SHARED):
        if all(_is_mapped(each, text) for text in maps):
            return each
    return range(0)


def _is_mapped(wanted: range, text: str) -> bool:
    for line in text.splitlines():
        inside, _, count = map(int, line.split())
        if inside <= wanted.start and wanted.stop <= inside + count:
            return True
    return False


def _groups(accel: str) -> tuple[int, ...]:
    if accel != "kvm":
        return ()
    device = KVM.stat()
    return (device.st_gid,) if _is_for_group(device) else ()


def _may_use_kvm(device: os.stat_result) -> bool:
    return _is_for_group(device) or device.st_mode & stat.S_IRWXO >= 0o6


def _is_for_group(device: os.stat_result) -> bool:
    """Whether joining its group helps. Not root's group: too much else is open to it."""
    return device.st_gid != 0 and device.st_mode & 0o060 == 0o060
