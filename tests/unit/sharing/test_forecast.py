"""plan: memory and time of many, against adding up one after the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from onecopy.model import MIB
from onecopy.sharing.forecast import Profile, forecast

PROFILE = Profile(
    system="web:latest",
    digest="sha256:1",
    accel="tcg",
    qemu="7.2",
    processors=2,
    shared=200 * MIB,
    each=20 * MIB,
    start_cpu=0.2,
    idle=0.003,
    clones=20,
)


@given(st.integers(1, 600), st.integers(1, 8), st.floats(0, 0.003), st.floats(0.01, 1))
def test_time_is_that_of_one_start_after_the_other(
    guests: int, processors: int, idle: float, cpu: float
) -> None:
    profile = replace(PROFILE, processors=processors, idle=idle, start_cpu=cpu)
    found = forecast(profile, guests)
    if guests * idle >= processors * 0.95:
        assert found.seconds is None or found.busy >= 0.95
        return
    # Each start has what those before it leave.
    steps = sum(cpu / (processors - (n + 0.5) * idle) for n in range(guests))
    assert found.seconds == pytest.approx(steps, rel=0.01)


def test_memory_and_hosts() -> None:
    one = forecast(PROFILE, 100)
    assert (one.hosts, one.per_host, one.fits) == (1, 100, None)
    assert one.memory == 2200 * MIB and one.busy == pytest.approx(0.15)
    # What is shared is there on each host.
    spread = forecast(PROFILE, 100, hosts=3)
    assert (spread.per_host, spread.memory) == (34, 880 * MIB)
    needed = forecast(PROFILE, 100, memory=1000 * MIB)
    assert (needed.hosts, needed.per_host, needed.fits) == (3, 34, True)
    assert forecast(PROFILE, 100, hosts=2, memory=1000 * MIB).fits is False
    # Not even one fits.
    assert forecast(PROFILE, 3, memory=210 * MIB).fits is False


def test_processors_that_do_not_keep_up() -> None:
    found = forecast(PROFILE, 700)
    assert found.seconds is None and found.busy > 1
    assert forecast(PROFILE, 700, processors=4).seconds is not None
