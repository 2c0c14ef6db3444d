"""The fork servers of a host's VMMs, as the kernel knows them.

Not here: servers without guests (tests/unit/vmm/fork_kit.py).
"""

from __future__ import annotations

from onecopy.guest.runtime import Runtime
from onecopy.linux import process
from onecopy.vmm import fork_registry, fork_server


def server_of(pid: int) -> int | None:
    """Return the fork server that is the parent of a VMM; None if it is not."""
    parent = process.parent(pid)
    return parent if fork_server.is_server(parent) else None


def servers(host: Runtime) -> list[int]:
    """Return the fork servers of a host's store that run."""
    return [each.process.pid for each in fork_registry.running() if each.store == host.run.name]
