"""Publishes a guest's ports on 127.0.0.1 of the host, from a user-mode network."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from onecopy.errors import InUse, InvalidInput, NotPermitted
from onecopy.vmm import router
from onecopy.vmm.vmm_user import port_capabilities

if TYPE_CHECKING:
    from onecopy.vmm.monitor import Monitor

Ports = tuple[tuple[int, int], ...]
"""Pairs (port on 127.0.0.1, port of the guest); 0 stands for any free port of the host."""

_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d{1,5})\s+\S+\s+(\d{1,5})\b")


def numbered(publish: Ports, number: int) -> Ports:
    """Return the ports of guest ``number`` (from 0) of several; each has the next host ports.

    Raises:
        InvalidInput: A host port exceeds 65535.
    """
    ports = tuple((host + number if host else 0, guest) for host, guest in publish)
    if any(host > 65535 for host, _ in ports):
        highest = max(host for host, _ in ports)
        raise InvalidInput(
            f"guest {number + 1} would need host port {highest}; the limit is 65535",
            hint="give a lower port, or 0 for any free port",
        )
    return ports


def need_rights(publish: Ports) -> bool:
    """Return whether a port needs root (ip(7), ip_unprivileged_port_start)."""
    return bool(port_capabilities(host for host, _ in publish))


def require_free(publish: Ports) -> None:
    """Check that the host ports are free, because QEMU's error does not name the port.

    Raises:
        InUse: A port is taken.
        NotPermitted: A port needs root.
    """
    for port, _ in publish:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except PermissionError:
                raise NotPermitted(
                    f"only root can publish port {port} of the host",
                    hint="give a higher port, or 0 for any free port",
                ) from None
            except OSError:
                raise InUse(
                    f"port {port} on 127.0.0.1 is taken",
                    users=(),
                    hint="give another port, or 0 for any free port",
                ) from None


async def forward(monitor: Monitor, folder: Path, publish: Ports) -> None:
    """Publish ports of a running guest.

    Raises:
        InUse: QEMU cannot listen on a port.
    """
    if router.is_there(folder):
        return  # published() does it
    for host, guest in publish:
        # QMP has no command for this. The human monitor prints nothing on success.
        reply = await monitor.human(f"hostfwd_add net tcp:127.0.0.1:{host}-:{guest}")
        if reply.strip():
            raise InUse(
                f"cannot publish port {host} on 127.0.0.1: {reply.strip()}",
                users=(),
                hint="give another port, or 0 for any free port",
            )


async def published(monitor: Monitor, folder: Path, publish: Ports) -> Ports:
    """Return the published ports, with the numbers that the kernel chose for 0.

    Raises:
        InUse: The router cannot listen on a port.
    """
    if router.is_there(folder):
        return await asyncio.to_thread(router.publish, folder, publish)
    if all(port for port, _ in publish):
        return publish
    # QMP has no command for this.
    text = await monitor.human("info usernet")
    return tuple(sorted((int(host), int(guest)) for host, guest in _FORWARD.findall(text)))
