"""Published ports: 127.0.0.1 of the host to a guest in QEMU's user-mode network."""

from __future__ import annotations

import re
import socket

from onecopy.errors import InUse, InvalidInput, NotPermitted
from onecopy.vmm.monitor import Monitor

Ports = tuple[tuple[int, int], ...]
"""(port on 127.0.0.1, port of the guest) pairs; 0 for any free port of the host."""

_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)")


def numbered(publish: Ports, number: int) -> Ports:
    """The ports of guest ``number`` of several, from 0: the host's count up; raise InvalidInput."""
    ports = tuple((host + number if host else 0, guest) for host, guest in publish)
    if any(host > 65535 for host, _ in ports):
        raise InvalidInput("there are not that many ports", hint="give a lower one, or 0 for any")
    return ports


def require_free(publish: Ports) -> None:
    """Raise InUse for a port that is taken, or NotPermitted; QEMU does not say which one."""
    for port, _ in publish:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except PermissionError:
                raise NotPermitted(
                    f"port {port} of the host may be published by root only",
                    hint="give a higher one, or 0 for any free one",
                ) from None
            except OSError:
                raise InUse(
                    f"port {port} on 127.0.0.1 is taken",
                    users=(),
                    hint="give another port, or 0 for any free one",
                ) from None


async def published(monitor: Monitor, publish: Ports) -> Ports:
    """The published ports, with those that were left to the kernel."""
    if all(port for port, _ in publish):
        return publish
    # QMP has no command for this.
    text = await monitor.human("info usernet")
    return tuple(sorted((int(host), int(guest)) for host, guest in _FORWARD.findall(text)))
