"""Published ports: 127.0.0.1 of the host to a guest in a network of its own."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

from onecopy.errors import InUse, InvalidInput, NotPermitted
from onecopy.vmm import router
from onecopy.vmm.monitor import Monitor
from onecopy.vmm.vmm_user import port_capabilities

Ports = tuple[tuple[int, int], ...]
"""(port on 127.0.0.1, port of the guest) pairs; 0 for any free port of the host."""

_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d{1,5})\s+\S+\s+(\d{1,5})\b")


def numbered(publish: Ports, number: int) -> Ports:
    """The ports of guest ``number`` of several, from 0: the host's count up; raise InvalidInput."""
    ports = tuple((host + number if host else 0, guest) for host, guest in publish)
    if any(host > 65535 for host, _ in ports):
        raise InvalidInput("there are not that many ports", hint="give a lower one, or 0 for any")
    return ports


def need_rights(publish: Ports) -> bool:
    """Whether only root may publish one of them (ip(7): ip_unprivileged_port_start)."""
    return bool(port_capabilities(host for host, _ in publish))


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


async def forward(monitor: Monitor, folder: Path, publish: Ports) -> None:
    """Publish ports of a guest that has been started without; raise InUse."""
    if router.is_there(folder):
        return  # published() does it
    for host, guest in publish:
        # QMP has no command for this; it says nothing if all is well.
        said = await monitor.human(f"hostfwd_add net tcp:127.0.0.1:{host}-:{guest}")
        if said.strip():
            raise InUse(
                f"port {host} on 127.0.0.1 cannot be published: {said.strip()}",
                users=(),
                hint="give another port, or 0 for any free one",
            )


async def published(monitor: Monitor, folder: Path, publish: Ports) -> Ports:
    """The published ports, with those that were left to the kernel; raise InUse."""
    if router.is_there(folder):
        return await asyncio.to_thread(router.publish, folder, publish)
    if all(port for port, _ in publish):
        return publish
    # QMP has no command for this.
    text = await monitor.human("info usernet")
    return tuple(sorted((int(host), int(guest)) for host, guest in _FORWARD.findall(text)))
