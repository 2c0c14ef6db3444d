"""The speed of the time-stamp counter is the one that the processor has."""

import platform

import pytest

from onecopy.linux import tsc
from tests.conftest import cannot_run


def test_two_measurements_agree() -> None:
    if platform.machine() != "x86_64":
        cannot_run("only x86 has this counter")
    first = tsc.megahertz()
    tsc.megahertz.cache_clear()
    second = tsc.megahertz()
    assert first and second
    assert 200 < first < 10_000
    assert abs(first - second) <= first * 0.001 + 1


def test_another_processor_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    tsc.megahertz.cache_clear()
    assert tsc.megahertz() is None
    tsc.megahertz.cache_clear()
