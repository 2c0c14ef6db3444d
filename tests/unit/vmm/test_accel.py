"""What a probe guest's end, or silence, is taken for. That real ones run: tests/vm."""

from __future__ import annotations

import subprocess
import tempfile

import pytest

from onecopy.vmm import accel

ERROR = b"KVM internal error. Suberror: 1"


def given_up(script: str) -> bool:
    """Whether the program still ran when nobody waited for it any more."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(["sh", "-c", script], stdout=output)
        try:
            accel._wait(process, output.fileno())
            return process.poll() is None
        finally:
            process.kill()
            process.wait()


def test_one_that_kvm_gave_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "PROBE_TIMEOUT", 1e6)
    monkeypatch.setattr(accel, "PROBE_PATIENCE", 1e6)
    assert given_up(f"echo '{ERROR.decode()}'; exec sleep 1000")


def test_one_that_says_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "PROBE_TIMEOUT", 0.3)
    assert given_up("echo begun; exec sleep 1000")


def test_one_that_talks_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "PROBE_PATIENCE", 0.3)
    assert given_up("while echo more; do sleep 0.05; done")


def test_one_that_ends() -> None:
    assert not given_up("echo done")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"Linux\n" + ERROR + b"\nRAX=00\nCode=fa 0f\n", ERROR.decode()),
        (b"Linux\nthe last word \n\n", "the last word"),
        (b"", "it printed nothing in 30 s"),
    ],
)
def test_why_it_came_no_further(said: bytes, why: str) -> None:
    assert accel._failure_line(said) == why
