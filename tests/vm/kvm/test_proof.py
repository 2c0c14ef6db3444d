"""Proves that guests run under KVM, by QEMU and by the guests' kernels.

The proof is written to ``$ONECOPY_RESULTS/proof.json``. A run under KVM without it does not pass.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from onecopy.guest.runtime import Runtime
from onecopy.vmm.monitor import connect
from tests.vm.conftest import Clones, RunIn


async def _query(folder: Path, command: str) -> Any:
    async with connect(folder) as monitor:
        return await monitor.execute(command)


@pytest.mark.smoke
def test_guests_run_under_kvm(host: Runtime, clones: Clones, run_in: RunIn) -> None:
    (guest,) = clones(1)
    said = run_in(guest, "sh", "-c", "dmesg | grep -o 'Hypervisor detected: .*'")
    proof = {
        "query-kvm": asyncio.run(_query(host.run / guest.name, "query-kvm")),
        "hypervisor": said.stdout.decode().strip().rpartition(": ")[2],
        "qemu": host.qemu.version,
    }
    assert proof["query-kvm"] == {"enabled": True, "present": True}
    assert proof["hypervisor"] == "KVM"
    assert guest.accel == "kvm"
    (Path(os.environ["ONECOPY_RESULTS"]) / "proof.json").write_text(json.dumps(proof) + "\n")
