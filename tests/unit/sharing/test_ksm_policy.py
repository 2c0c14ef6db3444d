"""ksm auto: what is decided, and that a host's settings are put back whatever ends it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from onecopy.errors import InvalidInput
from onecopy.guest.observe import ksm_auto
from onecopy.linux.counters import ksm
from onecopy.model import MIB
from onecopy.sharing.ksm_policy import Look, State, decide
from tests.unit.ksm_tree import everything, plain, sysfs

PLENTY = Look(total=1000 * MIB, available=500 * MIB, profit=0, full_scans=0)
SCARCE = replace(PLENTY, available=100 * MIB)


def after(*looks: Look) -> State:
    state = State()
    for look in looks:
        state = decide(state, look, below=0.2)
    return state


def test_it_runs_only_while_memory_is_scarce() -> None:
    assert not after(PLENTY).runs
    assert after(SCARCE).runs
    # It becomes slower first, and then stops.
    slower = after(SCARCE, replace(SCARCE, profit=9 * MIB), PLENTY)
    assert slower.runs and slower.pages == 64 + 300 - 50
    assert not after(SCARCE, *[PLENTY] * 30).runs


def test_it_becomes_faster_while_it_gains() -> None:
    gains = [replace(SCARCE, profit=n * 5 * MIB, full_scans=n * 3) for n in range(10)]
    state = after(*gains)
    assert state.runs and state.pages == 1250


def test_it_rests_longer_and_longer_while_it_gains_nothing() -> None:
    looks = [replace(SCARCE, full_scans=n) for n in range(120)]
    state, running = State(), []
    for look in looks:
        state = decide(state, look, below=0.2)
        running.append(state.runs)
    text = "".join("+" if each else "." for each in running)
    rests = [len(part) for part in text.split("+") if part]
    assert rests[:4] == [2, 4, 8, 16] and max(rests) <= 32
    # What it found before is forgotten when it gains.
    state = decide(replace(state, rest=0, runs=True), replace(looks[-1], profit=8 * MIB), below=0.2)
    assert state.runs and state.rests == 2


def test_what_ended_while_it_stood_is_no_loss() -> None:
    stale = replace(SCARCE, profit=300 * MIB)
    looks = [(100, 1), (10, 1), (30, 2), (60, 3), (80, 5), (90, 7)]
    state = after(stale, *(replace(SCARCE, profit=p * MIB, full_scans=n) for p, n in looks))
    assert state.runs and state.profit == 90 * MIB


@given(
    st.lists(
        st.builds(
            Look,
            total=st.just(100),
            available=st.integers(0, 100),
            profit=st.integers(-(10 * MIB), 100 * MIB),
            full_scans=st.integers(0, 50),
        )
    )
)
def test_it_never_runs_at_ease_for_long(looks: list[Look]) -> None:
    state = State()
    for look in looks:
        state = decide(state, look, below=0.2)
        assert 64 <= state.pages <= 1250
        assert not (state.runs and state.rest)
    for _ in range(30):
        state = decide(state, PLENTY, below=0.2)
    assert not state.runs


class Ended(Exception):
    pass


def sleeping(*acts: Callable[[], object]) -> Callable[[float], None]:
    """In place of time.sleep: something happens each time, and at last it is ended."""
    left = list(acts)

    def sleep(_: float) -> None:
        if not left:
            raise Ended
        left.pop(0)()

    return sleep


def memory(root: Path, available: int) -> None:
    text = f"MemTotal:  1000 kB\nMemAvailable:  {available} kB\n"
    (root / "proc/meminfo").write_text(text)


def test_the_host_is_put_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, said = plain(everything(root)), list[str]()
    memory(root, 100)
    seen = []
    look = sleeping(
        lambda: seen.append(everything(root)),
        lambda: memory(root, 900),
        *[lambda: None] * 8,
        lambda: seen.append(everything(root)),
    )
    monkeypatch.setattr("time.sleep", look)
    with pytest.raises(Ended):
        ksm_auto.run(1, 0.2, said.append, root)
    running, stopped = seen
    assert (running["run"], running["advisor_mode"]) == ("1", "scan-time")
    assert stopped["run"] == "0"
    assert plain(everything(root)) == before
    assert any("scarce" in text for text in said)


def test_somebody_else_looks_after_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(root, 100)
    monkeypatch.setattr("time.sleep", sleeping(lambda: sysfs(root, "run").write_text("2")))
    with pytest.raises(InvalidInput, match="another program"):
        ksm_auto.run(1, 0.2, lambda _: None, root)
    assert ksm.setting("run", root) == "2"
    sysfs(root, "run").write_text("1")
    with pytest.raises(InvalidInput, match="running already"):
        ksm_auto.run(1, 0.2, lambda _: None, root)
