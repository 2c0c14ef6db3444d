"""`advise` on guests with known sharing: it finds all equal pages and claims no more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import InvalidInput, NotFound
from onecopy.guest.observe import advise
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import ksm
from onecopy.model import MIB, Reference
from tests.command import ONECOPY, answer, onecopy, refused
from tests.vm.conftest import Clones, RunIn

SIZE = 8 * MIB


@pytest.fixture(autouse=True)
def _ksm_stopped() -> Iterator[None]:
    """KSM merges nothing meanwhile: what it has merged, nothing else can save any more."""
    if os.geteuid() or ksm.setting("run") is None:
        yield
        return
    with ksm.settings({"run": 0}):
        yield


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with 8 MiB that guests will have in memory, and a file that none has."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "known").write_bytes(os.urandom(SIZE - 1234))
    (folder / "other").write_bytes(os.urandom(MIB))
    return folder


@pytest.fixture
def alike(clones: Clones, run_in: RunIn, files: Path) -> list[GuestRecord]:
    """Clones with the same file at other addresses, the same data shifted, data of their own."""
    guests = clones(3)
    known, shifted = (files / "known").read_bytes(), os.urandom(SIZE)
    for number, guest in enumerate(guests):
        mine = {
            f"a{number}": os.urandom((1 + number) * MIB),
            "known": known,
            "shifted": b"\1" * (100 * (number + 1)) + shifted,
            "unique": os.urandom(SIZE),
        }
        for name, data in mine.items():
            done = run_in(guest, "sh", "-c", f"cat >/dev/shm/{name}", stdin=data)
            assert done.exit_code == 0, done.stderr
    return guests


def test_what_is_known_is_found_and_no_more(
    host: Runtime, alike: list[GuestRecord], files: Path
) -> None:
    names = [guest.name for guest in alike]
    advised = advise.look(host, names, files=[files])
    found = advised.survey
    assert not found.left_out
    advice = found.advice
    ways = {way.name: way for way in advice.ways}
    print(advice)
    # Two of three copies go. What else is a file's: a segment's page that a guest has changed back.
    can = 2 * SIZE
    assert 0.9 * can <= ways["extra"].saves <= can + MIB
    by_name = {Path(each.name).name: each for each in advice.files}
    assert 0.9 * 3 * SIZE <= by_name["known"].copies <= 3 * SIZE
    assert by_name["known"].guests == 3 and "other" not in by_name
    # It is at other addresses, and still what a guest saved now would share.
    assert ways["saved"].saves >= 0.9 * can and ways["ksm"].saves >= 0.9 * can
    # Shifted data and unique data are like no other page.
    assert advice.kinds["unique"] >= 0.9 * 3 * 2 * SIZE
    own = sum(guest.own for guest in advice.guests)
    assert own == advice.own == sum(advice.kinds.values())
    assert advice.possible <= own - advice.kinds["unique"]
    assert {guest.note for guest in advice.guests} == {""}
    assert advice.take[0] == "saved" and advice.best_guest in names
    saving = ("onecopy", "save", "shared-system", "--from", advice.best_guest)
    assert advised.steps[0].argv == saving
    assert all(guest.shared > 8 * MIB and guest.missed < MIB for guest in advice.guests)


def test_it_is_carried_out(host: Runtime, clones: Clones, files: Path, run_in: RunIn) -> None:
    (guest,) = clones(1)
    known = (files / "known").read_bytes()
    copies = "cd /dev/shm; cat >0; for n in 1 2 3; do cp 0 $n; done"
    assert run_in(guest, "sh", "-c", copies, stdin=known).exit_code == 0
    before = ksm.read()
    text = onecopy(
        "advise", guest.name, "--files", files, "--html", files.parent / "page.html"
    ).stdout
    # Where the guest has freed much, KSM is advised as well.
    taken = "Advice: extra. " in text or "Advice: extra and ksm. " in text
    assert taken, f"{text}\nKSM before: {before}\nKSM after: {ksm.read()}"
    assert str(files / "known") in text
    page = (files.parent / "page.html").read_text()
    assert guest.name in page and "onecopy build shared-files" in page and "<svg" in page
    told = answer("advise", guest.name, "--files", files, "--apply", "advised", "--json")
    assert told["built"] == ["advised-files:latest"]
    build, attach, *more = (step["argv"] for step in told["steps"])
    assert more in ([], [["onecopy", "ksm", "on"]])
    assert build == ["onecopy", "build", "advised-files", "--from", f"dir:{files}"]
    assert attach == ["onecopy", "attach", "GUEST", "advised-files:/MOUNTPOINT"]
    # Nothing of the guest was changed, and what it is advised to use is the same.
    onecopy("attach", guest.name, "advised-files:/advised")
    digests = run_in(guest, "sha256sum", "/dev/shm/3", "/advised/known").stdout.split()[::2]
    assert set(digests) == {hashlib.sha256(known).hexdigest().encode()}
    assert run_in(guest, "sh", "-c", "rm /dev/shm/?").exit_code == 0
    host.store.remove(Reference("advised-files"), in_use=True)


def test_names_and_files_that_are_not_there(clones: Clones, tmp_path: Path) -> None:
    (guest,) = clones(1)
    for args, code in (
        (["none"], NotFound.exit_code),
        ([guest.name, "--files", tmp_path / "none"], NotFound.exit_code),
        ([guest.name, "--root", tmp_path / "none"], NotFound.exit_code),
        ([guest.name, "--files", ONECOPY], InvalidInput.exit_code),
        ([guest.name, "--html", tmp_path / "none/page"], InvalidInput.exit_code),
    ):
        said = refused(code, "advise", *args)
        progress = ("onecopy: reading", "onecopy: comparing")
        assert len([x for x in said.splitlines() if not x.startswith(progress)]) == 2
