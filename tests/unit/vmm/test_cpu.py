"""Names of CPU models: QEMU knows what they stand for, and what cannot be is refused."""

import pytest

from onecopy.errors import Incompatible, MissingProgram
from onecopy.subprocesses import run
from onecopy.vmm.cpu import LEVELS, qemu_cpu
from onecopy.vmm.qemu import BINARY
from tests.conftest import cannot_run


def test_a_level_of_the_psabi() -> None:
    assert qemu_cpu("x86-64-v3", "tcg") == LEVELS["x86-64-v3"]
    # QEMU refuses where the host lacks a feature, in place of leaving it out.
    assert all(model.endswith(",enforce") for model in LEVELS.values())


def test_a_model_of_qemus_own() -> None:
    assert qemu_cpu("Skylake-Server-v4,-pcid", "kvm") == "Skylake-Server-v4,-pcid"
    assert qemu_cpu("host", "kvm") == "host"


def test_the_hosts_own_needs_kvm() -> None:
    with pytest.raises(Incompatible, match="host needs KVM") as caught:
        qemu_cpu("host", "tcg")
    assert "x86-64-v2" in caught.value.hint


def test_qemu_knows_every_feature() -> None:
    try:
        known = run([BINARY, "-cpu", "help"]).split()
    except MissingProgram as error:
        cannot_run(error.message)
    for model in LEVELS.values():
        base, *features = model.removesuffix(",enforce").split(",")
        assert base in known
        assert {feature[1:] for feature in features} <= set(known)
