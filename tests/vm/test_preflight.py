"""What a start is refused for, a dry run is refused for in the same words, and nothing is begun."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from onecopy.errors import (
    AgentFailed,
    AlreadyExists,
    CommandFailed,
    Incompatible,
    InsufficientResources,
    InUse,
    InvalidInput,
    MissingProgram,
    NoSlot,
    NotFound,
    NotPermitted,
    OnecopyError,
    OtherDomain,
    Restricted,
    StoreDamaged,
    TooLarge,
)
from onecopy.guest import network
from onecopy.guest.lifecycle import launchplan, save, start
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec, LaunchPlan
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.images.create import NewRange, create_segment
from onecopy.linux import disk_image, nftables, tap
from onecopy.linux.counters import meminfo
from onecopy.model import HUGE_PAGE_SIZE, MIB, Mergeable, PageClass, Reference, parse_mount
from onecopy.store import Artifact
from onecopy.vmm import closed_network, router, spawn, vmm_user
from onecopy.vmm.accel import Choice
from onecopy.vmm.fork_request import Forked
from tests.vm.conftest import left
from tests.vm.kept import MEMTEST

Request = start.Request
TAKEN = "taken"


@dataclass
class World:
    """What the cases are refused in: a guest that runs, a port in use, and files."""

    host: Runtime
    system: Reference
    root: Reference
    folder: Path
    port: int
    patch: pytest.MonkeyPatch

    def clone(self, count: int = 1, name: str | None = "new", **fields: Any) -> Request:
        return Request(CloneSpec(system=self.system, **fields), count, name, overcommit=True)

    def boot(self, **fields: Any) -> Request:
        spec = BootSpec(**{"root": self.root, "command": "", "memory": 128 * MIB, **fields})
        return Request(spec, 1, "new", overcommit=True)

    def image(self, name: str = "disk.raw", size: int = MIB) -> DiskSpec:
        path = self.folder / name
        with path.open("ab") as file:
            file.truncate(size)
        return DiskSpec(file=path)

    def used(self) -> DiskSpec:
        """A disk that somebody uses as long as the test runs."""
        spec = self.image("used.raw")
        assert spec.file
        fd = os.open(spec.file, os.O_RDWR)
        assert disk_image.lock(fd)
        return spec

    def segment(self, name: str, page_class: PageClass = PageClass.SR) -> Reference:
        ref = Reference(name)
        if not self.host.store.find(ref, "segment"):
            create_segment(self.host.store, ref, [NewRange(page_class, HUGE_PAGE_SIZE)])
        return ref

    def without(self, thing: Any, name: str, value: Any) -> None:
        self.patch.setattr(thing, name, value)


@pytest.fixture(scope="module")
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.fixture
def world(
    host: Runtime,
    minimal: Artifact,
    busybox_root: Artifact,
    busy_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    system, root = Reference.parse(minimal.ref), Reference.parse(busybox_root.ref)
    return World(host, system, root, tmp_path, busy_port, monkeypatch)


@pytest.fixture(scope="module")
def taken(host: Runtime, minimal: Artifact) -> Iterator[None]:
    """A guest whose name others cannot have."""
    request = Request(CloneSpec(system=Reference.parse(minimal.ref)), 1, TAKEN, overcommit=True)
    started = asyncio.run(start.start(host, start.plan(host, request)))
    yield
    host.end(*started.guests)


def _restricted(world: World) -> Request:
    ref = Reference("restricted")
    world.host.store.tag(world.system, ref)
    world.host.store.restrict(ref.name, lambda access: replace(access, restricted=True))
    return replace(world.clone(), spec=CloneSpec(system=ref))


def _domain(world: World, **fields: Any) -> Request:
    ref = Reference("of-a-domain")
    world.host.store.tag(world.system, ref, domain="lab")
    return replace(world.clone(), spec=CloneSpec(system=ref, **fields))


def _of_lab(world: World) -> Reference:
    world.host.store.tag(world.segment("plain"), Reference("of-lab"), domain="lab")
    return Reference("of-lab")


def _with_file_system(world: World) -> Reference:
    (world.folder / "tree").mkdir()
    (world.folder / "tree/file").write_text("of a file system")
    build_segment(world.host.store, Reference("with-files"), f"dir:{world.folder / 'tree'}")
    return Reference("with-files")


def _little_memory(world: World) -> Request:
    info = replace(meminfo.read(), available=MIB)
    world.without(meminfo, "read", lambda: info)
    return replace(world.clone(), overcommit=False)


def _open_to_all(world: World, error: Exception) -> Request:
    """Nothing closes guests, and nft cannot."""

    def load(rules: str, *, check: bool = False) -> None:
        raise error

    world.without(nftables, "load", load)
    world.without(nftables, "count_marked", lambda *_: 0)
    return world.clone()


def _no_numbers(world: World) -> Request:
    world.without(vmm_user, "why_not", lambda *_: "this root may not become another user")
    world.without(router, "find_program", _missing)
    return world.clone()


def _missing(name: str) -> str:
    raise MissingProgram(name, name)


def _no_rights(world: World) -> Request:
    world.without(tap, "require_bridge", lambda _: None)
    world.without(tap, "capabilities", lambda *_: 0)
    return world.clone(bridge="br0")


def _no_merging(world: World) -> Request:
    def no_such_call(*_: int) -> int:
        raise OSError(22, "Invalid argument")

    world.without(spawn, "prctl", no_such_call)
    return world.clone(ksm=Mergeable.ALL)


def _damaged(world: World) -> Request:
    layer = world.host.store.resolve(world.system).layer("state")
    real = Path.open

    def changed(path: Path, *args: Any, **options: Any) -> Any:
        return real(Path("/dev/null") if path == layer.path else path, *args, **options)

    world.without(Path, "open", changed)
    return world.clone()


def _many_disks(world: World) -> Request:
    return world.clone(disks=tuple(world.image(f"{number}.raw") for number in range(32)))


def _too_small_again(world: World) -> Request:
    path = world.host.store.root / "disks/new.img"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return world.clone(disks=(DiskSpec(size=32 * MIB),))


Case = tuple[Callable[[World], Request], type[OnecopyError], str]
CASES: dict[str, Case] = {
    "no system": (
        lambda w: replace(w.clone(), spec=CloneSpec(system=Reference("nothing"))),
        *(NotFound, "nothing"),
    ),
    "no guests": (lambda w: w.clone(0), InvalidInput, "cannot start 0 guests"),
    "a bad name": (lambda w: w.clone(name="no_name"), InvalidInput, "no_name"),
    "a taken name": (lambda w: w.clone(name=TAKEN), AlreadyExists, "taken is already running"),
    "a taken port": (
        lambda w: w.clone(publish=((w.port, 80),)),
        *(InUse, "on 127.0.0.1 is taken"),
    ),
    "a taken port of the second": (
        lambda w: w.clone(2, publish=((w.port - 1, 80),)),
        *(InUse, "on 127.0.0.1 is taken"),
    ),
    "no such port": (
        lambda w: w.clone(2, publish=((65535, 80),)),
        *(InvalidInput, "the limit is 65535"),
    ),
    "a restricted system": (_restricted, Restricted, "is restricted"),
    "a system of another domain than its root": (_domain, OtherDomain, "busybox belongs to"),
    "a segment of another domain": (
        lambda w: w.clone(segments=((_of_lab(w), ""),)),
        *(OtherDomain, "of-lab belongs to"),
    ),
    "KSM across domains": (
        lambda w: _domain(w, ksm=Mergeable.ALL),
        *(InvalidInput, "memory of the trust domain lab"),
    ),
    "KSM that this kernel has not": (_no_merging, Incompatible, "merge QEMU's own memory"),
    "memory of the host": (_little_memory, InsufficientResources, "memory"),
    "no such bridge": (lambda w: w.clone(bridge="nobridge"), NotFound, "no bridge 'nobridge'"),
    "no right to a bridge": (_no_rights, NotPermitted, "only root can connect"),
    "a bridge with ports": (
        lambda w: w.clone(bridge="br0", publish=((0, 80),)),
        *(InvalidInput, "not from a bridge"),
    ),
    "a bridge that reaches the host": (
        lambda w: w.clone(bridge="br0", allow_host=True),
        *(InvalidInput, "--allow-host applies to a user-mode network"),
    ),
    "no card": (
        lambda w: w.boot(network=False, publish=((0, 80),)),
        *(InvalidInput, "has no network card"),
    ),
    "rules that nft refuses": (
        lambda w: _open_to_all(w, CommandFailed("nft -f -", 1, "no such table")),
        *(Incompatible, "nft refused the rules: no such table"),
    ),
    "neither users nor a router": (_no_numbers, Incompatible, "cannot prevent the guest from"),
    "a damaged state": (_damaged, StoreDamaged, "differs from what was saved"),
    "less memory": (lambda w: w.clone(memory=64 * MIB), InvalidInput, "cannot have less"),
    "odd memory": (lambda w: w.clone(memory=129 * MIB), InvalidInput, "steps of 128 MiB"),
    "too much memory": (lambda w: w.clone(memory=1 << 50), TooLarge, "can get at most"),
    "fewer processors": (lambda w: w.clone(cpus=0), InvalidInput, "cannot have fewer"),
    "too many processors": (lambda w: w.clone(cpus=64), TooLarge, "can have at most"),
    "another accelerator": (
        lambda w: w.clone(
            accel=Choice.KVM
            if b'"accel":"tcg"' in w.host.store.resolve(w.system).config
            else Choice.TCG
        ),
        *(Incompatible, "cannot start under"),
    ),
    "no segment": (
        lambda w: w.clone(segments=(parse_mount("none:/mnt"),)),
        *(NotFound, "none"),
    ),
    "a segment twice": (
        lambda w: w.clone(segments=((w.segment("plain"), ""), (w.segment("plain"), ""))),
        *(AlreadyExists, "with plain loaded"),
    ),
    "a segment that was saved": (
        lambda w: w.clone(segments=((w.root, ""),)),
        *(AlreadyExists, "with busybox loaded"),
    ),
    "a device to mount": (
        lambda w: w.clone(segments=((w.segment("plain"), "/mnt"),)),
        *(InvalidInput, "has no file system"),
    ),
    "no mount point": (
        lambda w: w.clone(segments=((_with_file_system(w), "/a/../b"),)),
        *(InvalidInput, "is not a mount point"),
    ),
    "a mount point twice": (
        lambda w: w.clone(
            segments=((_with_file_system(w), "/mnt"),),
            disks=(DiskSpec(size=64 * MIB, mountpoint="/mnt"),),
        ),
        *(InvalidInput, "mount point /mnt is given twice"),
    ),
    "two own disks": (
        lambda w: w.clone(disks=(DiskSpec(size=64 * MIB), DiskSpec(size=64 * MIB))),
        *(InvalidInput, "one disk of its own"),
    ),
    "an own disk without a name": (
        lambda w: w.clone(name=None, disks=(DiskSpec(size=64 * MIB),)),
        *(InvalidInput, "needs a guest with a name"),
    ),
    "a small disk": (
        lambda w: w.clone(disks=(DiskSpec(size=MIB),)),
        *(InvalidInput, "is too small"),
    ),
    "a disk made smaller": (_too_small_again, InvalidInput, "cannot shrink"),
    "one disk for several": (
        lambda w: w.clone(2, disks=(w.image(),)),
        *(InvalidInput, "cannot share one disk image"),
    ),
    "a disk twice": (
        lambda w: w.clone(disks=(w.image(), w.image())),
        *(InUse, "is in use by another program"),
    ),
    "a disk in use": (
        lambda w: w.clone(disks=(w.used(),)),
        *(InUse, "is in use by another program"),
    ),
    "no disk": (
        lambda w: w.clone(disks=(DiskSpec(file=Path("/nowhere")),)),
        *(NotFound, "no disk /nowhere"),
    ),
    "a folder as disk": (
        lambda w: w.clone(disks=(DiskSpec(file=w.folder),)),
        *(InvalidInput, "is a directory"),
    ),
    "an empty disk": (
        lambda w: w.clone(disks=(w.image("empty.raw", 0),)),
        *(InvalidInput, "is empty"),
    ),
    "a disk with another head": (
        lambda w: w.clone(disks=(w.image("raw.qcow2"),)),
        *(InvalidInput, "has no qcow2 header"),
    ),
    "a file of the store": (
        lambda w: w.clone(disks=(DiskSpec(file=w.host.store.root / "index.json"),)),
        *(InvalidInput, "is part of the store"),
    ),
    "too many disks": (_many_disks, NoSlot, "free slots for segments and disks"),
    "no root": (lambda w: w.boot(root=Reference("nothing")), NotFound, "nothing"),
    "no init": (lambda w: w.boot(command=None), InvalidInput, "has no init"),
    "a small guest": (lambda w: w.boot(memory=MIB), InsufficientResources, "memory for a guest"),
    "a bare machine with a command": (
        lambda w: w.boot(root=MEMTEST, command="true"),
        *(InvalidInput, "--command does not apply to"),
    ),
    "a command without an agent": (
        lambda w: replace(w.boot(root=MEMTEST, command=None), needs_agent=True),
        *(AgentFailed, "is a bare machine"),
    ),
    "a disk of a bare machine": (
        lambda w: w.boot(root=MEMTEST, command=None, disks=(w.image(),)),
        *(InvalidInput, "as a bare machine"),
    ),
}


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("case", CASES)
def test_both_refuse(world: World, case: str) -> None:
    asks, error, told = CASES[case]
    request = asks(world)
    before = left(world.host)
    with pytest.raises(error, match=told) as dry:
        start.dry_run(world.host, start.plan(world.host, request))
    with pytest.raises(error, match=told) as real:
        asyncio.run(start.start(world.host, start.plan(world.host, request)))
    assert (real.value.message, real.value.hint) == (dry.value.message, dry.value.hint)
    assert left(world.host) == before


#: What the launcher would meet by itself, and does if it is not checked before.
MET = [
    *("a taken name", "a taken port", "no such bridge"),
    *("rules that nft refuses", "neither users nor a router"),
    *("a damaged state", "a segment twice", "a device to mount", "a disk twice", "a disk in use"),
    *("a disk made smaller", "no disk", "a folder as disk", "an empty disk", "too many disks"),
    *("a disk with another head", "a file of the store"),
]


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("case", MET)
def test_a_start_that_nothing_has_checked_fails_alike(world: World, case: str) -> None:
    fails_unchecked(world, case)


@pytest.mark.usefixtures("taken")
def test_a_forked_qemu_that_ends_at_once_is_told_alike(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, ended = Forked.begin, []

    def and_end(process: Forked) -> None:
        begin(process)
        # The server reaps it, as it happens on a busy host.
        while Path(f"/proc/{process.pid}").exists():
            time.sleep(0.01)
        ended.append(process.pid)

    monkeypatch.setattr(Forked, "begin", and_end)
    fails_unchecked(world, "a taken port")
    assert ended


def fails_unchecked(world: World, case: str) -> None:
    """A start that no check has refused fails as the check would have told, and leaves nothing."""
    asks, error, _ = CASES[case]
    request = asks(world)
    before = left(world.host)

    def unchecked(host: Runtime, plan: LaunchPlan) -> None:
        pass

    world.without(start, "check_guest", unchecked)
    world.without(launchplan, "require_possible", lambda *_: None)
    world.without(network, "check", lambda *_: None)
    with pytest.raises(error):
        asyncio.run(start.start(world.host, start.plan(world.host, request)))
    assert left(world.host) == before


def test_a_dry_run_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the rules that close guests, which a start puts in force."""
    loaded = []
    monkeypatch.setattr(nftables, "count_marked", lambda *_: 0)
    monkeypatch.setattr(nftables, "load", lambda _, check=False: loaded.append(check))
    before = left(world.host)
    request = world.clone(2, disks=(DiskSpec(size=64 * MIB),))
    first, second = start.dry_run(world.host, start.plan(world.host, request))
    assert first != second and "guest=new-1" in first and "guest=new-2" in second
    assert set(loaded) == {True}
    assert left(world.host) == before
    assert not list((world.host.store.root / "disks").glob("new-*"))


def test_keep_going_tells_who_cannot_start(world: World, taken: None) -> None:
    request = replace(world.clone(2, name="some"), keep_going=True)
    with contextlib.suppress(NotFound):
        world.host.forget("some-1")
    blocker = Request(CloneSpec(system=world.system), 1, "some-2", overcommit=True)
    first = asyncio.run(start.start(world.host, start.plan(world.host, blocker)))
    group = start.plan(world.host, request)
    (argv,) = start.dry_run(world.host, group)
    assert "guest=some-1" in argv
    assert [(name, error.id) for name, error in group.refused] == [("some-2", "already-exists")]
    done = asyncio.run(start.start(world.host, group))
    assert [guest.name for guest in done.guests] == ["some-1"]
    assert [name for name, _ in done.failures] == ["some-2"]
    world.host.end(*first.guests, *done.guests)


def test_all_refuse_if_none_can_start(world: World, taken: None) -> None:
    request = replace(world.clone(name=TAKEN), keep_going=True)
    done = asyncio.run(start.start(world.host, start.plan(world.host, request)))
    assert done.guests == () and [name for name, _ in done.failures] == [TAKEN]


def test_a_save_is_refused_before_it_boots(world: World) -> None:
    host, root = world.host, world.root

    def plan(ref: Reference, **fields: Any) -> LaunchPlan:
        spec = BootSpec(**{"root": root, "command": "", "memory": 128 * MIB, **fields})
        return save.plan_save(host, ref, spec)

    with pytest.raises(AlreadyExists, match="busybox:latest is a segment"):
        plan(root)
    with pytest.raises(InvalidInput, match="cannot be part of a saved system"):
        plan(Reference("new"), segments=((world.segment("common", PageClass.SW), ""),))
    with pytest.raises(InvalidInput, match="is a bare kernel"):
        plan(Reference("new"), root=MEMTEST, command=None)
    world.without(closed_network, "_is_in_force", lambda *_: False)
    world.without(nftables, "load", _refusing)
    with pytest.raises(Incompatible, match="nft refused"):
        plan(Reference("new"))


def _refusing(rules: str, *, check: bool = False) -> None:
    raise CommandFailed("nft -f -", 1, "no")
