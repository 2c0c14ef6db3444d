"""The short form of script/workloads: a few modules of CPython's tests, and power cuts.

Not here: other workloads (script/workloads).
"""

from __future__ import annotations

from random import Random

import pytest

from onecopy.guest.runtime import Runtime
from onecopy.store import Artifact
from tests.vm.conftest import ACCEL
from tests.workloads import campaign, powercut
from tests.workloads.catalogue import QUICK, cpython
from tests.workloads.tap import End

#: Tests that the modules have at least, whatever the release of Python.
MANY = 250


@pytest.fixture(scope="module", autouse=True)
def programs(host: Runtime) -> None:
    """The segment of the programs."""
    campaign.ensure_programs(host)


def test_cpython_says_the_same_in_a_chroot_a_guest_and_a_clone(
    host: Runtime, python_root: Artifact
) -> None:
    outcome = campaign.run(host, cpython(QUICK, clones=1), python_root, ACCEL or "auto", print)
    assert outcome.wrong == [], outcome.said
    assert set(outcome.results) == {"chroot", "booted", "clone 1"}
    for place, results in outcome.results.items():
        assert results.count(End.PASSED) > MANY, place


def test_nothing_acknowledged_is_lost_when_the_power_goes(
    host: Runtime, python_root: Artifact
) -> None:
    kinds = ["booted", "clone", "clone"]
    random = Random(1)  # noqa: S311
    done = powercut.cuts(host, powercut.DATABASES[0], kinds, random, ACCEL or "auto")
    assert [cut.kind for cut in done] == kinds
    assert all(cut.acknowledged for cut in done)
