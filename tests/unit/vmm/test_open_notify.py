"""What a QEMU that opens saved RAM for writing needs of the kernel: told before it is started."""

import pytest

from onecopy.errors import Incompatible
from onecopy.guest.observe.doctor import _starting
from onecopy.linux.sandbox import seccomp
from onecopy.vmm import open_notify
from onecopy.vmm.qemu import Qemu


def _qemu(rom: bool) -> Qemu:
    return Qemu("/usr/bin/qemu-system-x86_64", "7.2.0", "pc-q35-7.2", ("pc-q35-7.2",), rom, ())


@pytest.mark.parametrize(
    ("kernel", "rom", "state"),
    [(True, False, "ok"), (True, True, "ok"), (False, True, "ok"), (False, False, "limited")],
)
def test_doctor_and_start_agree(
    kernel: bool, rom: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seccomp, "can_ask", lambda: kernel)
    assert _starting(_qemu(rom)).state == state
    if state == "ok":
        open_notify.require(_qemu(rom))
    else:
        with pytest.raises(Incompatible) as caught:
            open_notify.require(_qemu(rom))
        assert "QEMU 8.2" in caught.value.hint
