"""What `boot` and `run` ask for, option by option, and what they print; nothing is started."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecopy import cli
from onecopy.cli.starting import print_started
from onecopy.errors import GuestFailed
from onecopy.guest.lifecycle import start
from onecopy.guest.lifecycle.batch import Started
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec
from onecopy.guest.run_directory import REQUESTED, run_root
from onecopy.model import MIB, Mergeable, Reference
from onecopy.store import Store
from onecopy.vmm.accel import Choice
from tests.unit.guest_kit import record


def test_a_start_that_fell_back_to_exec_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    guests = (
        record("web-1", forked=True),
        record("web-2", why_exec=REQUESTED),
        record("web-3", why_exec="it hangs"),
        record("web-4", why_exec="it hangs"),
    )
    print_started((Started(guests, ()), 0), as_json=False, quiet=False)
    told = capsys.readouterr()
    assert told.out.count("started in") == 4
    assert told.err.splitlines() == ["onecopy: tcg: asked for", "onecopy: no fork server: it hangs"]


class Door:
    """Stands where guests are started: keeps what was asked for."""

    def __init__(self) -> None:
        self.request = start.Request(CloneSpec(system=Reference("none")))
        self.failures: tuple[tuple[str, GuestFailed], ...] = ()

    def plan(self, _host: object, request: start.Request, _tell: object) -> start.Group:
        self.request = request
        return start.Group(())

    async def start(self, *_: object) -> Started:
        return Started((record("web-1"), record("web-2")), self.failures)

    def dry_run(self, *_: object) -> list[list[str]]:
        return [["qemu", "a b"]]


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path))
    monkeypatch.setattr("onecopy.cli.signals.ignore", lambda: None)
    found = Door()
    for name in ("plan", "start", "dry_run"):
        monkeypatch.setattr(start, name, getattr(found, name))
    yield found
    shutil.rmtree(run_root(Store()), ignore_errors=True)


GROUP = "-n 2 --name web -p 80:81 -p 82 --bridge br0 --ksm none --disk 1G:/d --overcommit"
FIELDS: dict[str, Any] = {
    "publish": ((80, 81), (0, 82)),
    "bridge": "br0",
    "ksm": Mergeable.NONE,
    "disks": (DiskSpec(size=1024 * MIB, mountpoint="/d"),),
}
DATA = ((Reference("data"), "/srv"),)


@pytest.mark.parametrize(
    ("line", "spec"),
    [
        ("run app", CloneSpec(system=Reference("app"))),
        (
            f"run {GROUP} --segment data:/srv --memory 1G --cpus 2 --allow-host --accel tcg app:2",
            CloneSpec(
                system=Reference("app", "2"), segments=DATA, memory=1024 * MIB, cpus=2,
                allow_host=True, accel=Choice.TCG, **FIELDS,
            ),
        ),
        ("boot app", BootSpec(root=Reference("app"))),
        (
            f"boot {GROUP} --segment data:/srv --memory 1G --cpus 2 --cpu max --command x "
            "--ready y --timeout 9 --no-network --kernel /k --modules /m --accel kvm app",
            BootSpec(
                root=Reference("app"), segments=DATA, memory=1024 * MIB, cpus=2, cpu="max",
                command="x", ready="y", timeout=9, network=False, kernel=Path("/k"),
                modules=Path("/m"), accel=Choice.KVM, **FIELDS,
            ),
        ),
    ],
)  # fmt: skip
def test_each_option_is_asked_for(door: Door, line: str, spec: BootSpec | CloneSpec) -> None:
    assert cli.main(line.split()) == 0
    assert door.request.spec == spec
    many = GROUP in line
    assert (door.request.count, door.request.name) == ((2, "web") if many else (1, None))
    assert door.request.overcommit is many
    assert not door.request.needs_agent and not door.request.keep_going


def test_what_is_printed(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "app"]) == 0
    out, err = capsys.readouterr()
    assert [line.partition(" started in ")[0] for line in out.splitlines()] == ["web-1", "web-2"]
    # The reason for the accelerator stands there once.
    assert err.count("asked for") == 1


def test_what_did_not_start(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    door.failures = (("web-3", GuestFailed("it broke")),)
    assert cli.main(["run", "--keep-going", "app"]) == GuestFailed.exit_code
    assert door.request.keep_going
    assert "web-3 did not start: it broke" in capsys.readouterr().err


def test_a_dry_run(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["boot", "--dry-run", "app", "sh", "-c", "x"]) == 0
    assert capsys.readouterr().out == "qemu 'a b'\n"
    # A program is to be run, so an image without an init just stays up.
    assert door.request.needs_agent
    assert isinstance(door.request.spec, BootSpec) and door.request.spec.idle
