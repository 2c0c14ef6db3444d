"""The fork servers of a host's VMMs, as the kernel knows them.

Not here: servers without guests (tests/unit/vmm/fork_kit.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from onecopy.guest.runtime import Runtime
from onecopy.vmm import fork_registry


def server_of(pid: int) -> int | None:
    """Return the fork server that is the parent of a VMM; None if there is none."""
    try:
        found = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert found
        line = Path(f"/proc/{found[1]}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # one of them has ended
        return None
    return int(found[1]) if b"-fork-server" in line.split(b"\0") else None


def servers(host: Runtime) -> list[int]:
    """Return the fork servers of a host's store that run."""
    return [each.process.pid for each in fork_registry.running() if each.store == host.run.name]
