"""What a guest's kernel is told under TCG, by QEMU's version."""

import pytest

from onecopy.linux import tsc
from onecopy.vmm.cpu import DEFAULT, LEVELS
from onecopy.vmm.tcg import kernel_words

_ALWAYS = "no_timer_check cryptomgr.notests noreplace-smp"


@pytest.mark.parametrize("version", ["7.2.22", "6.1", "8.0.0", "10.0.13", "odd"])
def test_only_an_old_qemu_hides_cmpxchg16b(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsc, "megahertz", lambda: 2400)
    old = version.startswith(("7.", "6."))
    assert (
        kernel_words("tcg", version, LEVELS[DEFAULT])
        == _ALWAYS + " tsc_early_khz=2400000" + " clearcpuid=141" * old
    )


def test_a_clock_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsc, "megahertz", lambda: None)
    assert kernel_words("tcg", "10.0.0", LEVELS[DEFAULT]) == _ALWAYS


def test_a_guest_that_is_a_host_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsc, "megahertz", lambda: None)
    assert kernel_words("tcg", "7.2.22", "max") == _ALWAYS


def test_kvm_needs_none_of_it() -> None:
    assert kernel_words("kvm", "7.2.22", LEVELS[DEFAULT]) == ""
