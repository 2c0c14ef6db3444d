"""The part of router.py that runs in new user and network namespaces; a program of its own.

Usage: ``python -I -S router_child.py SOCKET PLAN``. It creates a tap device, sends its descriptor
to the socket, gives it addresses, and loads the rules of the plan. It then waits until the socket
is closed, so that the namespaces have a process that identifies them.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

_TUNSETIFF = 0x400454CA
_TAP, _NO_PACKET_INFO = 0x0002, 0x1000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_SIOCSIFHWADDR, _ARPHRD_ETHER = 0x8924, 1
_UP_AND_RUNNING = 0x1 | 0x40


def main(number: str, text: str) -> None:
    """Carry out the plan; report an error to the socket."""
    with socket.socket(fileno=int(number)) as peer:
        try:
            tap = _set_up(**json.loads(text))
        except OSError as error:
            peer.sendall(f"{error.filename or 'tap'}: {error.strerror}".encode())
        except subprocess.CalledProcessError as error:
            peer.sendall(f"nft refused the rules: {error.stderr.splitlines()[0]}".encode())
        else:
            socket.send_fds(peer, [b"."], [tap])
        peer.recv(1)


def _set_up(nft: str, device: str, mac: str, addresses: list[str], mask: str, rules: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TAP | _NO_PACKET_INFO))
    hardware = struct.pack("=H6s8x", _ARPHRD_ETHER, bytes.fromhex(mac))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFHWADDR, struct.pack("16s16s8x", device.encode(), hardware))
    _up("lo")
    for alias, address in enumerate(addresses):
        _up(f"{device}:{alias}" if alias else device, address, mask)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    subprocess.run([nft, "-f", "-"], input=rules, capture_output=True, text=True, check=True)
    return tap


def _up(name: str, address: str = "", mask: str = "") -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for call, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, mask)):
            if value:
                packed = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(value))
                fcntl.ioctl(control, call, struct.pack("16s16s8x", name.encode(), packed))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), _UP_AND_RUNNING))


if __name__ == "__main__":
    main(*sys.argv[1:])
