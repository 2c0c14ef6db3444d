"""An emulated host in trouble is a clear failure with its logs, and never a pass (vmtest/).

Its root is busybox, because it does not get as far as running tests.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from onecopy.errors import GuestFailed
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from onecopy.vmm.agent import Agent
from onecopy.vmm.monitor import connect
from tests.vm.conftest import vmms
from vmtest import verdict
from vmtest.host import EmulatedHost, emulated_host
from vmtest.images import Images

MEMORY = 192 * MIB
PANIC = "echo 1 >/proc/sys/kernel/sysrq; echo before; echo c >/proc/sysrq-trigger"
EAT = "tail /dev/zero; echo it goes on"


async def call(
    host: Runtime, root: Artifact, folder: Path, script: str, *, stop: bool = False
) -> tuple[int, bytes]:
    """Exit code and output of a script in an emulated host, which may stop running meanwhile."""
    said = bytearray()

    async def freeze(emulated: EmulatedHost) -> None:
        while b"before" not in said:
            await asyncio.sleep(0.05)
        async with connect(emulated.run_folder) as monitor:
            await monitor.execute("stop")

    images = Images(Reference.parse(root.ref), ())
    async with emulated_host(host, images, folder, MEMORY) as emulated:
        frozen = asyncio.ensure_future(freeze(emulated)) if stop else None
        try:
            argv = ["sh", "-c", script]
            return await emulated.call(argv, 120, said.extend, silence=15), bytes(said)
        except GuestFailed:
            assert ("RIP=" if stop else "unknown") in await emulated.processors()
            raise
        finally:
            if frozen:
                frozen.cancel()


@pytest.mark.parametrize(
    ("script", "stop", "message"),
    [
        (PANIC, False, "ended"),
        ("echo before; sleep 100", True, "printed nothing for 15 s"),
    ],
    ids=["panic", "hang"],
)
def test_one_that_ends_or_hangs(
    host: Runtime,
    busybox_root: Artifact,
    tmp_path: Path,
    script: str,
    stop: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The agent that hangs is asked to end the script, and would have a minute.
    monkeypatch.setattr(Agent.call, "__kwdefaults__", {"timeout": 5.0})
    with pytest.raises(GuestFailed, match=message):
        asyncio.run(call(host, busybox_root, tmp_path, script, stop=stop))
    # What it said is kept, and nothing of it lives on.
    assert b"before" in (tmp_path / "output.log").read_bytes()
    assert (tmp_path / "console.log").exists()
    assert not vmms(host)
    assert "junit.xml is missing" in verdict.tests(tmp_path)[0]


def test_one_out_of_memory(host: Runtime, busybox_root: Artifact, tmp_path: Path) -> None:
    code, said = asyncio.run(call(host, busybox_root, tmp_path, EAT))
    # The program's own end may look like any other: the kernel's word is enough to fail.
    assert code == 0
    assert b"it goes on" in said
    assert any("Out of memory" in text for text in verdict.console(tmp_path))


@pytest.mark.parametrize(
    ("junit", "proof", "problem"),
    [
        ("", None, "junit.xml is missing or truncated"),
        ('<testsuite tests="5" skipped="1"/>', None, "1 skipped"),
        ('<testsuite tests="5" failures="2"/>', None, "2 failures"),
        ('<testsuite tests="0"/>', None, "no test ran"),
        ('<testsuite tests="5"/>', None, "there is no proof"),
        ('<testsuite tests="5"/>', '{"query-kvm": {"enabled": false}}', "not run under KVM"),
    ],
)
def test_results_that_are_no_pass(
    tmp_path: Path, junit: str, proof: str | None, problem: str
) -> None:
    (tmp_path / "junit.xml").write_text(junit)
    if proof:
        (tmp_path / "proof.json").write_text(proof)
    assert any(problem in text for text in verdict.tests(tmp_path))
