"""A guest commits a new version of a segment: complete and verified, or not at all."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecopy.errors import (
    AlreadyExists,
    GuestFailed,
    InsufficientResources,
    InvalidInput,
    NameConflict,
    StoreDamaged,
)
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.commit import Committed, commit
from onecopy.images.build import BuildOptions, build_segment
from onecopy.linux import cow_pages
from onecopy.model import MIB, Reference
from onecopy.store import Access, Artifact
from tests.vm.conftest import Boot, Clones, RunIn
from tests.vm.segments import load, read

REF = Reference("notes")


@pytest.fixture
def notes(host: Runtime, tmp_path: Path) -> Artifact:
    """An ext2 segment with the file `text` and 8 MiB of room."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text").write_text("first\n")
    return build_segment(
        host.store, REF, f"dir:{tmp_path}/notes", BuildOptions(fs="ext2", room=8 * MIB)
    )


def make(host: Runtime, guest: GuestRecord, target: Reference | None = None) -> Committed:
    return asyncio.run(commit(host, guest.name, "notes", target))


def change(host: Runtime, guest: GuestRecord, run_in: RunIn, text: str) -> None:
    if not any(i.name == "notes" and i.state == "loaded" for i in now(host, guest).attached):
        load(host, guest, "notes:/notes", exclusive=True)
    done = run_in(guest, "sh", "-c", f"echo {text} >>/notes/text; echo {text} >/notes/{text}")
    assert done.exit_code == 0, done.stderr


def now(host: Runtime, guest: GuestRecord) -> GuestRecord:
    return host.guest(guest.name).record()


def content(host: Runtime, clones: Clones, run_in: RunIn, ref: str = "notes") -> str:
    """What a new guest finds."""
    (guest,) = clones(1)
    load(host, guest, f"{ref}:/notes")
    return run_in(guest, "cat", "/notes/text").stdout.decode()


def test_what_a_guest_has_changed_is_the_new_version(
    host: Runtime,
    clones: Clones,
    boot: Boot,
    run_in: RunIn,
    notes: Artifact,
    busybox_root: Artifact,
) -> None:
    guest, reader = boot(busybox_root), clones(1)[0]
    load(host, reader, "notes:/notes")
    change(host, guest, run_in, "second")
    host.store.restrict("notes", lambda _: Access(restricted=True, grants=("*",)))
    done = make(host, guest)
    assert done.artifact.ref == notes.ref and done.artifact.digest != notes.digest
    assert 0 < done.written < 4 * MIB
    assert content(host, clones, run_in) == "first\nsecond\n"
    assert host.store.access("notes").restricted
    # Present users keep what they have, and the guest goes on.
    assert run_in(reader, "cat", "/notes/text").stdout == b"first\n"
    assert [each.digest for each in host.store.pending()] == [notes.digest]
    change(host, guest, run_in, "third")
    assert run_in(guest, "cat", "/notes/text").stdout == b"first\nsecond\nthird\n"
    image = done.artifact.layer("image").path
    subprocess.run(["e2fsck", "-f", "-n", image], check=True, capture_output=True)
    host.store.restrict("notes", lambda _: Access())


def test_under_another_name(host: Runtime, clones: Clones, run_in: RunIn, notes: Artifact) -> None:
    (guest,) = clones(1)
    change(host, guest, run_in, "second")
    done = make(host, guest, Reference("notes", "v2"))
    assert done.artifact.ref == "notes:v2"
    assert host.store.resolve(REF).digest == notes.digest
    assert content(host, clones, run_in, "notes:v2") == "first\nsecond\n"
    change(host, guest, run_in, "third")
    with pytest.raises(AlreadyExists):
        make(host, guest, Reference("notes", "v2"))
    host.store.remove(Reference("notes", "v2"), in_use=True)


def test_no_update_is_lost(host: Runtime, clones: Clones, run_in: RunIn, notes: Artifact) -> None:
    first, second = clones(2)
    change(host, first, run_in, "one")
    change(host, second, run_in, "two")
    kept = make(host, first).artifact
    with pytest.raises(NameConflict) as refused:
        make(host, second)
    assert refused.value.hint
    assert host.store.resolve(REF).digest == kept.digest
    assert make(host, second, Reference("notes", "other")).artifact.ref == "notes:other"
    host.store.remove(Reference("notes", "other"))


def test_only_what_was_loaded_to_be_written(
    host: Runtime, clones: Clones, run_in: RunIn, notes: Artifact
) -> None:
    (guest,) = clones(1)
    load(host, guest, "notes:/notes")
    assert run_in(guest, "touch", "/notes/new").exit_code != 0
    with pytest.raises(InvalidInput, match="has no writable copy"):
        make(host, guest)


def test_a_spoilt_file_system_is_refused(
    host: Runtime, clones: Clones, run_in: RunIn, notes: Artifact
) -> None:
    (guest,) = clones(1)
    load(host, guest, "notes", exclusive=True)
    zeroes = "dd if=/dev/urandom of=/dev/onecopy/notes bs=4096 count=40 seek=1 conv=notrunc"
    assert run_in(guest, "sh", "-c", f"{zeroes} 2>/dev/null; sync").exit_code == 0
    with pytest.raises(StoreDamaged, match="nothing was stored"):
        make(host, guest)
    unchanged(host, notes)
    assert run_in(guest, "true").exit_code == 0


def unchanged(host: Runtime, notes: Artifact) -> None:
    host.sweep()
    assert host.store.resolve(REF).digest == notes.digest
    host.store.verify(notes)
    assert list((host.store.root / "tmp").iterdir()) == []


Copy = Callable[[int, Any, int], None]


def test_qemu_dies_in_the_middle(
    host: Runtime, clones: Clones, run_in: RunIn, notes: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    (guest,) = clones(1)
    change(host, guest, run_in, "second")
    real: Copy = cow_pages.copy_out

    def copy(pid: int, runs: Any, out: int) -> None:
        ended = os.pidfd_open(pid)
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        select.select([ended], [], [], 60)
        os.close(ended)
        real(pid, runs, out)

    monkeypatch.setattr(cow_pages, "copy_out", copy)
    with pytest.raises(GuestFailed, match="nothing was stored"):
        make(host, guest)
    unchanged(host, notes)


def test_the_disk_fills_in_the_middle(
    host: Runtime, clones: Clones, run_in: RunIn, notes: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace of the commit is on a file system that is filled while pages are copied."""
    (guest,) = clones(1)
    change(host, guest, run_in, "second")
    tmp = host.store.root / "tmp"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "small", tmp], check=True)
    real: Copy = cow_pages.copy_out

    def copy(pid: int, runs: Any, out: int) -> None:
        with pytest.raises(OSError, match="No space"), (tmp / "filler").open("wb", 0) as file:
            while True:
                file.write(bytes(MIB))
        real(pid, runs, out)

    monkeypatch.setattr(cow_pages, "copy_out", copy)
    try:
        with pytest.raises(InsufficientResources):
            make(host, guest)
        assert run_in(guest, "cat", "/notes/text").stdout == b"first\nsecond\n"
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", tmp], check=True)
    unchanged(host, notes)
    assert content(host, clones, run_in) == "first\n"
    make(host, guest)
    assert content(host, clones, run_in) == "first\nsecond\n"


def test_a_killed_command_leaves_the_guest_running(
    host: Runtime, clones: Clones, run_in: RunIn, notes: Artifact
) -> None:
    """Killed while the guest stands still: the next command lets it go on."""
    import sys
    import time

    (guest,) = clones(1)
    change(host, guest, run_in, "second")
    program = (
        "import time, sys; from onecopy.guest import pause; pause._WATCHDOG = 3; "
        "from onecopy.guest.segments import commit; "
        "commit.cow_pages.copy_out = lambda *a: (print('here', flush=True), time.sleep(1000)); "
        "from onecopy.cli import main; main(['commit', sys.argv[1], 'notes'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, guest.name], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"here\n"
        process.kill()
    folder = host.run / guest.name
    assert (folder / "paused").exists()
    Runtime.open(host.store.root)
    assert not (folder / "paused").exists()
    assert run_in(guest, "true").exit_code == 0
    unchanged(host, notes)
    deadline = time.monotonic() + 120
    # The watchdog in the guest thaws its file system.
    while run_in(guest, "sh", "-c", "ls /run/onecopy/frozen/notes").exit_code == 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    make(host, guest)
    assert content(host, clones, run_in) == "first\nsecond\n"


def test_a_range_without_a_file_system(
    host: Runtime, clones: Clones, run_in: RunIn, tmp_path: Path
) -> None:
    from onecopy.images.create import NewRange, create_segment
    from onecopy.model import HUGE_PAGE_SIZE, PageClass

    create_segment(
        host.store,
        Reference("notes"),
        [NewRange(PageClass.EW, HUGE_PAGE_SIZE), NewRange(PageClass.SN, HUGE_PAGE_SIZE)],
    )
    (guest,) = clones(1)
    load(host, guest, "notes")
    script = "printf data | dd of=/dev/onecopy/notes bs=1 seek=5000 conv=notrunc,fsync 2>/dev/null"
    assert run_in(guest, "sh", "-c", script).exit_code == 0
    make(host, guest)
    (other,) = clones(1)
    load(host, other, "notes")
    assert read(run_in, other, "notes", 4096, 1)[904:908] == b"data"
    assert shutil.disk_usage(host.store.root).free > 0
