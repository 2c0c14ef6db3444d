"""`plan` measures real clones, ends them, and keeps its results."""

from __future__ import annotations

import asyncio

import pytest

from onecopy.errors import GuestFailed
from onecopy.guest.observe import plan
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
from onecopy.sharing.forecast import Work
from onecopy.store import Artifact
from tests.command import ONECOPY, answer

#: Bytes that a guest writes, and the work for it.
_EATEN = 16 * MIB
_EAT = Work(
    f"{ONECOPY} exec $GUEST -- dd if=/dev/urandom of=/run/eaten bs=1M count={_EATEN // MIB}"
)
#: A guest answers with its name.
_ASK = Work('test "$(busybox wget -qO- http://127.0.0.1:$PORT/)" = $GUEST', 80)


def test_a_few_clones_are_measured(host: Runtime, saved: Artifact) -> None:
    before = {guest.name for guest in host.guests()}
    assert plan.kept(host, saved) is None
    profile = asyncio.run(plan.measure(host, saved, plan.Size(1, 3, 1.0)))
    assert {guest.name for guest in host.guests()} == before
    assert profile.digest == saved.digest and profile.clones == 4
    assert profile.shared > 8 * MIB and profile.each > MIB and profile.start_cpu > 0
    plan.keep(host, saved, profile)
    assert plan.kept(host, saved) == profile
    # The command takes what is known.
    found = answer("plan", "--json", "--system", saved.ref, "--guests", "100", "--memory", "2G")
    assert found["profile"]["digest"] == saved.digest and found["profile"]["clones"] == 4
    assert found["memory"] == profile.shared + found["per_host"] * profile.each
    assert found["fits"]


def test_clones_that_work_cost_more(host: Runtime, saved: Artifact) -> None:
    size = plan.Size(1, 2, 1.0)
    idle = asyncio.run(plan.measure(host, saved, size))
    busy = asyncio.run(plan.measure(host, saved, size, work=_EAT))
    assert busy.each > idle.each + 0.8 * _EATEN
    plan.keep(host, saved, busy)
    assert plan.kept(host, saved) is None and plan.kept(host, saved, _EAT) == busy


def test_work_reaches_a_port_of_each(host: Runtime, saved: Artifact) -> None:
    size = plan.Size(1, 2, 1.0)
    assert asyncio.run(plan.measure(host, saved, size, work=_ASK)).work == _ASK


def test_work_that_fails(host: Runtime, saved: Artifact) -> None:
    before = {guest.name for guest in host.guests()}
    with pytest.raises(GuestFailed, match="exit code 3: no such work"):
        work = Work("echo no such work >&2; exit 3")
        asyncio.run(plan.measure(host, saved, plan.Size(1, 1, 1.0), work=work))
    assert {guest.name for guest in host.guests()} == before
