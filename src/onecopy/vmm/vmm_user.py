"""The user that QEMU runs as when root starts it: one per guest.

Such a user is only a number. It has no name, no files except the guest's, and no record that could
become stale.

Not here: QEMU's other restrictions (confine.py).
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

#: User ids that nothing else assigns (systemd docs/UIDS-GIDS.md): for guests that are closed to
#: this host (closed_network.py), and for those that may reach it.
CLOSED, OPEN = range(0x70000000, 0x78000000), range(0x78000000, 0x7F000000)
#: All user ids that only guests have.
GUESTS = range(CLOSED.start, OPEN.stop)
#: The ids of systemd's dynamic users, for user namespaces without the others.
_SHARED = range(61184, 65520)
KVM = Path("/dev/kvm")

_BIND_SERVICE = 1 << 10  # CAP_NET_BIND_SERVICE
#: CAP_CHOWN, CAP_SETGID, CAP_SETUID: needed to give a process and its files to another user.
_NEEDED = 1 << 0 | 1 << 6 | 1 << 7


class User(msgspec.Struct, frozen=True):
    """A user (and group) id, and its supplementary groups."""

    id: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, pid: int, root: Path = ROOT) -> User | None:
        """Return the user of a process; None if the process has ended."""
        with contextlib.suppress(OSError):
            status = (root / f"proc/{pid}/status").read_text()
            if found := re.search(r"^Uid:\s+\d+\s+(\d+)", status, re.MULTILINE):
                return cls(int(found[1]))
        return None

    def own(self, file: int | Path) -> None:
        """Make this user the owner of a file."""
        os.chown(file, self.id, self.id)

    def become(self, capabilities: int = 0) -> None:
        """Switch this thread to the user, with at most ``capabilities``.

        Raises:
            OSError: the kernel refused.
        """
        become(self.id, self.id, self.groups)
        set_capabilities(capabilities)


def new_user(accel: str, *, allow_host: bool = False) -> User | None:
    """Choose a user for a new guest; None if it must run as the calling user."""
    if os.geteuid() != 0 or why_not(accel):
        return None
    usable = _usable_range(wanted=OPEN if allow_host else CLOSED)
    return User(unused(usable), _groups(accel))


def why_not(accel: str, root: Path = ROOT) -> str:
    """Return the reason why root cannot run guests as users of their own; "" if it can."""
    if not _usable_range(root):
        return "this container has no user ids for guests"
    if capabilities(root) & _NEEDED != _NEEDED:
        return "root may not change to another user here"
    if accel == "kvm" and not _may_use_kvm(KVM.stat()):
        return "/dev/kvm has no suitable group with access to it"
    return ""


def have_own_numbers(root: Path = ROOT) -> bool:
    """Whether guests get user ids that nothing else has, so that rules can identify them."""
    return os.geteuid() == 0 and not why_not("tcg", root) and _usable_range(root) == CLOSED


def small_range_size(root: Path = ROOT) -> int:
    """Return the number of user ids for guests if it is small, else 0."""
    count = len(_usable_range(root))
    return count if count < MANY else 0


def port_capabilities(ports: Iterable[int], root: Path = ROOT) -> int:
    """Return the capabilities for publishing ``ports`` that this process has (ip(7))."""
    first = read_number(root / "proc/sys/net/ipv4/ip_unprivileged_port_start")
    low = any(0 < port < (1024 if first is None else first) for port in ports)
    return _BIND_SERVICE & capabilities(root) if low else 0


def _usable_range(root: Path = ROOT, wanted: range = CLOSED) -> range:
    """Return ``wanted``, or another range that this user namespace has (user_namespaces(7))."""
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
    """Whether its group has access; root's group does not count, as it opens too much else."""
    return device.st_gid != 0 and device.st_mode & 0o060 == 0o060
