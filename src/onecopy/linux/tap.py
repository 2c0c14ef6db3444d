"""Tap devices: a guest's card as an interface of the host, in a bridge.

Linux Documentation/networking/tuntap.rst, netdevice(7). The interface goes with the last copy of
its descriptor, so it ends with the VMM that has it, however that ends. Not here: bridges
themselves, which are the administrator's.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

from onecopy.errors import GuestFailed, NotFound, NotPermitted, as_root
from onecopy.linux.files import ROOT
from onecopy.linux.process import capabilities

_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TAP, _NO_PACKET_INFO = 0x0002, 0x1000
_SIOCBRADDIF, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x89A2, 0x8913, 0x8914
_UP = 1
_NET_ADMIN = 1 << 12  # CAP_NET_ADMIN


def open_tap(bridge: str, *, connected: bool = True) -> int:
    """A descriptor of a new tap device that is up, and a port of ``bridge`` if it is ``connected``.

    Raises NotFound (no such bridge, or no tap devices), NotPermitted.
    """
    require_bridge(bridge)
    try:
        fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
        try:
            name = _make(fd)
            if connected:
                _join(name, bridge)
        except BaseException:
            os.close(fd)
            raise
    except PermissionError as error:
        raise _not_permitted() from error
    except FileNotFoundError as error:
        raise _no_tun() from error
    return fd


def require_possible(bridge: str, root: Path = ROOT) -> None:
    """Raise as `open_tap` does, and make no tap device."""
    require_bridge(bridge)
    if not Path(_TUN).exists():
        raise _no_tun()
    if not capabilities(root) & _NET_ADMIN:
        raise _not_permitted()


def _not_permitted() -> NotPermitted:
    return NotPermitted(
        "only root can connect a guest to a bridge",
        hint="leave --bridge out: the guest then has a user-mode network (-p forwards ports)",
    )


def _no_tun() -> NotFound:
    return NotFound(f"this host has no {_TUN}", hint=as_root("modprobe tun"))


def require_bridge(bridge: str) -> None:
    """Raise NotFound if this host has no such bridge."""
    if "/" in bridge or not Path(f"/sys/class/net/{bridge}/bridge").is_dir():
        raise NotFound(
            f"there is no bridge {bridge!r} on this host",
            hint="`ip link show type bridge` lists them; `ip link add br0 type bridge` makes one",
        )


def connect_tap(fd: int, bridge: str) -> None:
    """Make the tap device of a descriptor a port of ``bridge``; raise NotFound, GuestFailed."""
    require_bridge(bridge)
    try:
        _join(fcntl.ioctl(fd, _TUNGETIFF, bytes(40))[:16], bridge)
    except OSError as error:
        raise GuestFailed(f"the guest cannot be connected to {bridge}: {error.strerror}") from error


def _join(name: bytes, bridge: str) -> None:
    """Put an interface into the bridge."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        number = socket.if_nametoindex(name.rstrip(b"\0").decode())
        fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), number))


def _make(fd: int) -> bytes:
    """Make ``fd`` a tap device that is up; return its name."""
    # The kernel puts a number in place of %d.
    asked = struct.pack("16sH22x", b"onecopy%d", _TAP | _NO_PACKET_INFO)
    name = fcntl.ioctl(fd, _TUNSETIFF, asked)[:16]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", name, 0))
        up = struct.unpack("16sH22x", flags)[1] | _UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, up))
    return name
