"""Admission: what the host has no memory for is refused, with the figures."""

import re

import pytest

from onecopy.errors import NotEnough
from onecopy.guest import admission
from onecopy.host import meminfo
from onecopy.model import MIB

HOST = b"MemTotal: 1024000 kB\nMemAvailable: 460800 kB\n"  # 1000 and 450 MiB


@pytest.fixture
def small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meminfo, "read", lambda: meminfo.parse(HOST))


@pytest.mark.usefixtures("small_host")
def test_as_many_as_fit() -> None:
    # 50 MiB of the 450 are kept for the host.
    admission.require(100 * MIB, 4)
    with pytest.raises(NotEnough) as refused:
        admission.require(100 * MIB, 5)
    assert (refused.value.needed, refused.value.available) == (550 * MIB, 450 * MIB)
    assert re.search(r"takes 100 MiB, and 50 MiB are left .* 4 would fit", refused.value.hint)


@pytest.mark.usefixtures("small_host")
def test_a_cold_guest_needs_its_ram_and_a_clone_does_not() -> None:
    admission.require(admission.of_clone("kvm"), 10)
    with pytest.raises(NotEnough):
        admission.require(admission.of_cold("kvm", 512 * MIB))


def test_a_kernel_that_does_not_tell_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meminfo, "read", lambda: meminfo.parse(b""))
    admission.require(1 << 60)
