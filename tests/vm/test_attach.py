"""Loading segments into running guests and unloading them, and each refusal's error."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from onecopy.errors import (
    AlreadyExists,
    GuestFailed,
    InvalidInput,
    NoSlot,
    NotFound,
    NotUnmounted,
    OnecopyError,
    OtherDomain,
    Restricted,
    StoreDamaged,
    TooLarge,
)
from onecopy.guest.observe import advise
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.images.create import NewRange, create_segment
from onecopy.model import MIB, PageClass, Reference
from onecopy.store import Access, Artifact
from tests.vm.conftest import Boot, Clones, RunIn
from tests.vm.guests import Guests
from tests.vm.segments import load, make, read, record, unload


@pytest.fixture
def site(host: Runtime, tmp_path: Path) -> Artifact:
    """Segment with a file `page`, as EROFS."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/page").write_text("a page\n")
    return build_segment(host.store, Reference("site"), f"dir:{tmp_path}/site")


@pytest.mark.parametrize("kind", ["booted", pytest.param("clone", marks=pytest.mark.smoke)])
def test_mounted_used_and_unloaded(
    host: Runtime,
    boot: Boot,
    clones: Clones,
    run_in: RunIn,
    busybox_root: Artifact,
    site: Artifact,
    kind: str,
) -> None:
    guest = boot(busybox_root) if kind == "booted" else clones(1)[0]
    item = load(host, guest, "site:/srv/site")
    assert (item.ref, item.mountpoint, item.state) == ("site:latest", "/srv/site", "loaded")
    assert run_in(guest, "cat", "/srv/site/page").stdout == b"a page\n"
    mounts = run_in(guest, "grep", "/srv/site", "/proc/mounts").stdout.decode()
    assert "erofs ro" in mounts and "dax=always" in mounts
    # Its pages are the blob's, not a copy: the VMM maps that very file.
    inode = host.store.resolve(Reference("site")).layer("image").path.stat().st_ino
    lines = Path(f"/proc/{guest.pid}/maps").read_text().splitlines()
    assert any(f" {inode} " in line and "r--s" in line for line in lines)
    assert guest.name in host.store.users(site.digest)

    kept = unload(host, guest, "site")
    assert kept.state == "detached"
    assert run_in(guest, "cat", "/srv/site/page").exit_code != 0
    assert run_in(guest, "ls", "/dev/onecopy/site").exit_code != 0
    assert guest.name in host.store.users(site.digest)
    again = load(host, guest, "site")
    assert again.devices == item.devices
    assert read(run_in, guest, "site", 4) != b""


def test_what_is_in_use_is_not_unloaded(
    host: Runtime, guests: Guests, run_in: RunIn, minimal: Artifact, site: Artifact
) -> None:
    guest = guests.clone(minimal)[0].record
    load(host, guest, "site:/srv")
    run_in(guest, "sh", "-c", "exec 3</srv/page; (sleep 1000 </dev/null >/dev/null 2>&1 &)")
    with pytest.raises(NotUnmounted) as refused:
        unload(host, guest, "site")
    (holder,) = refused.value.holders
    pid, command = holder.split()
    assert command == "sleep" and holder in refused.value.message
    assert run_in(guest, "cat", "/srv/page").exit_code == 0
    run_in(guest, "kill", pid)
    assert unload(host, guest, "site").state == "detached"


def test_each_refusal_has_its_own_error(
    host: Runtime, guests: Guests, minimal: Artifact, site: Artifact, tmp_path: Path
) -> None:
    guest = guests.clone(minimal)[0].record
    store = host.store
    store.tag(Reference("site"), Reference("secret"))
    store.restrict("secret", lambda _: Access(restricted=True, grants=("other-*",)))
    store.tag(Reference("site"), Reference("blue"), domain="blue")
    make(host, tmp_path / "raw", "raw", PageClass.SR)
    # Without content: to read as much takes minutes in an emulated host.
    create_segment(store, Reference("big"), [NewRange(PageClass.SN, 8 << 30)])
    load(host, guest, "site:/srv")
    refusals: list[tuple[str, type[OnecopyError]]] = [
        ("unknown", NotFound),
        ("secret", Restricted),
        ("blue", OtherDomain),
        ("site", AlreadyExists),
        ("big", TooLarge),
        ("raw:/srv/raw", InvalidInput),
        ("raw:/srv/../raw", InvalidInput),
    ]
    for what, error in refusals:
        with pytest.raises(OnecopyError) as refused:
            load(host, guest, what)
        assert type(refused.value) is error, (what, refused.value)
        assert refused.value.hint
    store.tag(Reference("site"), Reference("twin"))
    with pytest.raises(GuestFailed, match="mounted on /srv"):
        load(host, guest, "twin:/srv")
    assert {item.name: item.state for item in record(host, guest).attached}["twin"] == "detached"
    with pytest.raises(InvalidInput, match="runs from"):
        unload(host, guest, "busybox")
    with pytest.raises(NotFound):
        unload(host, guest, "unknown")
    store.restrict("secret", lambda _: Access(restricted=True, grants=(guest.name,)))
    assert load(host, guest, "secret").state == "loaded"
    for name in ("secret", "blue", "raw", "big", "twin"):
        store.remove(Reference(name), in_use=True)


def test_no_slot_left(host: Runtime, guests: Guests, minimal: Artifact, tmp_path: Path) -> None:
    guest = guests.clone(minimal)[0].record
    make(host, tmp_path / "many", "many", *[PageClass.SR] * 30)
    make(host, tmp_path / "few", "few", *[PageClass.SR] * 2)
    load(host, guest, "many")
    with pytest.raises(NoSlot) as refused:
        load(host, guest, "few")
    assert refused.value.hint
    for name in ("many", "few"):
        host.store.remove(Reference(name), in_use=True)


def test_a_truncated_blob_is_not_mapped(
    host: Runtime, guests: Guests, run_in: RunIn, minimal: Artifact, tmp_path: Path
) -> None:
    """A guest that ran beyond the end of its file would be killed (SIGBUS)."""
    guest = guests.clone(minimal)[0].record
    segment = make(host, tmp_path / "cut", "cut", PageClass.SR)
    path = segment.layer("image").path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(StoreDamaged):
        load(host, guest, "cut")
    assert run_in(guest, "true").exit_code == 0
    host.store.remove(Reference("cut"))


def test_two_commands_load_the_same_at_once(
    host: Runtime, clones: Clones, run_in: RunIn, site: Artifact
) -> None:
    from onecopy.guest.segments.attach import attach

    guests = clones(2)

    async def all_at_once() -> list[object]:
        loads = [attach(host, guest.name, Reference("site"), "/srv") for guest in guests * 2]
        return await asyncio.gather(*loads, return_exceptions=True)

    results = asyncio.run(all_at_once())
    refused = [each for each in results if isinstance(each, Exception)]
    assert len(refused) == 2 and all(isinstance(each, AlreadyExists) for each in refused)
    for guest in guests:
        assert run_in(guest, "cat", "/srv/page").stdout == b"a page\n"


def test_a_guest_of_a_domain(
    host: Runtime, boot: Boot, run_in: RunIn, busybox_root: Artifact, site: Artifact
) -> None:
    """Nothing that it maps, nor its own memory, is shared with a guest of another domain."""
    store = host.store
    store.tag(Reference("busybox"), Reference("blue-root"), domain="blue")
    blue_site = store.tag(Reference("site"), Reference("blue-site"), domain="blue")
    assert blue_site.layer("image").digest != site.layer("image").digest
    other, guest = boot(busybox_root), boot(store.resolve(Reference("blue-root")))
    load(host, guest, "blue-site:/srv")
    assert run_in(guest, "cat", "/srv/page").stdout == b"a page\n"
    with pytest.raises(OtherDomain):
        load(host, guest, "site")
    assert not mapped(host, guest) & mapped(host, other)
    # Nor does KSM make one page of theirs.
    assert mergeable(other) and not mergeable(guest)
    # Nor is any advised.
    with pytest.raises(InvalidInput, match="domains"):
        advise.look(host, [other.name, guest.name])
    left_out = {each.name for each in advise.look(host).survey.left_out}
    assert guest.name in left_out and other.name not in left_out
    found = advise.look(host, [guest.name])
    assert found.domain == "blue" and found.survey.advice.own > MIB
    ways = {way.name: way.saves for way in found.survey.advice.ways}
    assert ways["ksm"] == 0
    store.verify(blue_site)
    host.end(guest)
    for artifact in store.artifacts():
        if store.access(artifact.name).domain == "blue":
            store.remove(Reference.parse(artifact.ref))


def mergeable(guest: GuestRecord) -> bool:
    """Whether KSM may merge any of its VMM's memory (proc_pid_smaps(5), VmFlags)."""
    lines = Path(f"/proc/{guest.pid}/smaps").read_text().splitlines()
    return any(line.startswith("VmFlags:") and "mg" in line.split() for line in lines)


def mapped(host: Runtime, guest: GuestRecord) -> set[str]:
    """Inodes of the store that its VMM maps."""
    lines = Path(f"/proc/{guest.pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if str(host.store.root) in line}
