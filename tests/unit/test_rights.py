"""Who may start saved systems: told before QEMU is started, with the way out."""

import os

import pytest

from onecopy.errors import NotPermitted
from onecopy.guest.doctor import _starting
from onecopy.guest.start import _require_right
from onecopy.vmm.qemu import Qemu


def _qemu(rom: bool) -> Qemu:
    return Qemu("/usr/bin/qemu-system-x86_64", "7.2.0", "pc-q35-7.2", ("pc-q35-7.2",), rom)


@pytest.mark.parametrize(
    ("user", "rom", "state"),
    [(0, False, "ok"), (0, True, "ok"), (1000, True, "ok"), (1000, False, "limited")],
)
def test_doctor_and_start_agree(
    user: int, rom: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert _starting(_qemu(rom)).state == state
    if state == "ok":
        _require_right(_qemu(rom))
    else:
        with pytest.raises(NotPermitted) as caught:
            _require_right(_qemu(rom))
        assert "QEMU 8.2" in caught.value.hint
