"""Admission: what the host has no memory for is refused, with the figures."""

import re

import pytest

from onecopy.errors import InsufficientResources
from onecopy.guest.lifecycle import admission
from onecopy.linux.counters import meminfo
from onecopy.model import MIB

HOST = b"MemTotal: 1024000 kB\nMemAvailable: 460800 kB\n"  # 1000 and 450 MiB


@pytest.fixture
def small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meminfo, "read", lambda: meminfo.parse(HOST))


@pytest.mark.usefixtures("small_host")
def test_as_many_as_fit() -> None:
    # 50 MiB of the 450 are kept for the host.
    admission.require(100 * MIB, 4)
    with pytest.raises(InsufficientResources) as refused:
        admission.require(100 * MIB, 5)
    assert (refused.value.needed, refused.value.available) == (550 * MIB, 450 * MIB)
    assert re.search(
        r"needs 100 MiB and the host keeps 50 MiB, so 4 more would fit", refused.value.hint
    )


@pytest.mark.usefixtures("small_host")
def test_a_cold_guest_needs_its_ram_and_a_clone_does_not() -> None:
    admission.require(admission.of_clones("kvm").each, 10)
    with pytest.raises(InsufficientResources):
        admission.require(admission.of_booted("kvm", 512 * MIB).each)


def test_a_kernel_that_does_not_tell_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meminfo, "read", lambda: meminfo.parse(b""))
    admission.require(1 << 60)


@pytest.mark.parametrize(
    ("count", "translated"), [(1, 128), (140, 128), (250, 67), (400, 34), (10000, 32)]
)
def test_what_qemu_may_translate_is_counted(
    monkeypatch: pytest.MonkeyPatch, count: int, translated: int
) -> None:
    # 24 GiB, of which nearly 1 GiB is in use: there is room for 400 clones, with less of it.
    host = b"MemTotal: 24683520 kB\nMemAvailable: 23634944 kB\n"
    monkeypatch.setattr(meminfo, "read", lambda: meminfo.parse(host))
    need = admission.of_clones("tcg", count)
    assert need.translated == translated * MIB
    assert need.each - admission.of_clones("kvm", count).each == need.translated
    if count <= 400:
        admission.require(need.each, count)
    else:
        with pytest.raises(InsufficientResources):
            admission.require(need.each, count)
    cold = admission.of_booted("tcg", 256 * MIB)
    assert cold.each - admission.of_booted("kvm", 256 * MIB).each == cold.translated == 128 * MIB


@pytest.mark.usefixtures("small_host")
def test_no_guest_at_all_needs_what_one_does() -> None:
    assert admission.of_clones("tcg", 0) == admission.of_clones("tcg", 1)
