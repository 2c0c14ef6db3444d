"""The confinement of VMMs: as the kernel reports it, and by a rogue program in QEMU's place.

The same launch() starts the rogue (rogue.c) in the same confinement, but without QEMU's own
`-sandbox`. A guest that takes over QEMU cannot drop that either. The rogue is started both ways: by
exec, and by a fork server.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from onecopy.guest.backing import displayed
from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle import launcher, start
from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec
from onecopy.guest.lifecycle.save import save_system
from onecopy.guest.lifecycle.stop import stop_guests
from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.run_directory import GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.attach import attach
from onecopy.guest.segments.commit import commit
from onecopy.images.build import build_segment
from onecopy.images.create import NewRange, create_segment
from onecopy.images.kernel import ensure_kernel
from onecopy.images.tools import ensure_tools
from onecopy.linux.process import exists
from onecopy.linux.sandbox import landlock, rlimits
from onecopy.model import HUGE_PAGE_SIZE, MIB, PageClass, Reference
from onecopy.sharing.account import measure
from onecopy.store import Artifact, Store
from onecopy.vmm import name_servers, vmm_limits
from onecopy.vmm.argv import PORTS, Hardware, Launch, Nic
from onecopy.vmm.logs import CONSOLE, LOG_ROOM, QEMU
from onecopy.vmm.qemu_process import prepare
from onecopy.vmm.vmm_user import KVM, User, new_user
from tests.conftest import cannot_run
from tests.unit.bpf import decide, seccomp_filters
from tests.unit.other_user import NOBODY, as_nobody
from tests.vm.conftest import ACCEL, Boot, Clones
from tests.vm.guests import Guests, clone_plan
from tests.vm.kept import copy_artifact
from tests.vm.rogue import BY_NAME, READ_ONLY, Outcome, Rogue, compile_rogue, run_rogue

#: What QEMU has open besides files: event loop, sockets, virtual machine, where it asks for files.
ANONYMOUS = re.compile(
    r"anon_inode:\[(eventfd|eventpoll|signalfd|timerfd)\]|socket:\[\d+\]|"
    r"anon_inode:(kvm-\S+|seccomp notify)"
)
#: System calls, and the high halves of what denies one (linux/seccomp.h): to end the process or the
#: thread, a signal, an error.
CLONE, FORK, VFORK, EXECVE = 56, 57, 58, 59
DENYING = (0x8000, 0x0000, 0x0003, 0x0005)
#: And in its run folder.
OWN = {"qemu.log", "console.log", *(f"{name}.{way}" for name, _ in PORTS for way in ("in", "out"))}


@pytest.fixture(scope="module", autouse=True)
def _landlock() -> None:
    if not landlock.abi():
        cannot_run("this kernel has no Landlock")


@pytest.fixture(scope="module")
def rogues() -> Iterator[dict[str, Rogue]]:
    # Not below pytest's own folder, which only root can enter.
    with tempfile.TemporaryDirectory(prefix="onecopy-rogue-") as folder:
        yield {way: compile_rogue(Path(folder), way) for way in ("exec", "fork")}


@pytest.fixture(params=["exec", "fork"])
def rogue(rogues: dict[str, Rogue], request: pytest.FixtureRequest) -> Rogue:
    return rogues[request.param]


def status(guest: GuestRecord) -> dict[str, str]:
    lines = Path(f"/proc/{guest.pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def groups(guest: GuestRecord) -> list[str]:
    """What lets it use KVM, and nothing else."""
    return [str(KVM.stat().st_gid)] if guest.accel == "kvm" else []


@pytest.fixture
def isolated(guests: Guests, saved: Artifact) -> GuestRecord:
    """A clone whose VMM started by exec."""
    return guests.clone(saved, isolated_vmm=True)[0].record


def test_each_vmm_is_a_user_of_its_own(
    clones: Clones, boot: Boot, busybox_root: Artifact, isolated: GuestRecord
) -> None:
    guests = [*clones(2), boot(busybox_root, memory=128 * MIB), isolated]
    assert [guest.forked for guest in guests] == [True, True, True, False]
    users = set()
    for guest in guests:
        told = status(guest)
        (user,) = set(told["Uid"].split())
        assert int(user) >= 61184
        assert told["Gid"].split() == [user] * 4
        assert told["Groups"].split() == groups(guest)
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(told[kind], 16) == 0
        assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")
        # Our filter, and QEMU's.
        assert told["Seccomp_filters"] == "2"
        users.add(user)
    assert len(users) == len(guests)


def test_a_low_port_takes_one_capability(boot: Boot, busybox_root: Artifact) -> None:
    low = next(port for port in range(1023, 600, -1) if _is_free(port))
    guest = boot(busybox_root, memory=128 * MIB, publish=((low, 80),))
    told = status(guest)
    assert {int(told[kind], 16) for kind in ("CapPrm", "CapEff", "CapAmb")} == {1 << 10}
    assert told["Uid"].split()[0] != "0"


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_vmm_has_only_what_it_needs(
    host: Runtime,
    clones: Clones,
    boot: Boot,
    busybox_root: Artifact,
    isolated: GuestRecord,
) -> None:
    for guest in (*clones(1), boot(busybox_root, memory=128 * MIB), isolated):
        blobs = 0
        for target, access in open_files(guest.pid):
            if Path(target).is_relative_to(host.store.root):
                assert access == os.O_RDONLY, target
                blobs += 1
            elif Path(target).is_relative_to(host.run):
                folder, name = Path(target).parent, Path(target).name
                assert folder == host.run / guest.name
                assert name in OWN | {"initrd"}
            else:
                devices = {"/dev/null"} | ({str(KVM)} if guest.accel == "kvm" else set())
                assert target in devices or ANONYMOUS.fullmatch(target), target
        assert blobs > len(guest.attached)


def test_a_disk_is_the_one_file_that_it_may_write_to(
    host: Runtime, guests: Guests, saved: Artifact, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MIB))
    guest = guests.clone(saved, disks=[str(disk)])[0].record
    own = {str(host.run / guest.name / name) for name in OWN}
    writable = {what for what, access in open_files(guest.pid) if access != os.O_RDONLY}
    named = {what for what in writable if not ANONYMOUS.fullmatch(what)}
    assert named - own - {"/dev/null", str(KVM)} == {str(disk)}
    # It has the open file alone: the name is still that of a file of ours.
    assert disk.stat().st_uid == os.geteuid()
    assert not disk.stat().st_mode & 0o022


def open_files(pid: int) -> Iterator[tuple[str, int]]:
    """(what it is, how it was opened) of each open file, but for those closed while we look."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(fd.readlink()).removesuffix(" (deleted)")
            flags = (Path(f"/proc/{pid}/fdinfo") / fd.name).read_text()
        except FileNotFoundError:
            continue
        found = re.search(r"^flags:\s+(\d+)", flags, re.MULTILINE)
        assert found
        yield target, int(found[1], 8) & os.O_ACCMODE


@pytest.fixture
def place(host: Runtime, saved: Artifact) -> Iterator[tuple[RunDirectory, int]]:
    """A run folder for a VMM, and the descriptor of its lease."""
    with host.batch() as batch, host.claim("rogue", [saved.digest], batch) as (folder, lease):
        prepare(folder.path)
        yield folder, lease.fd
        folder.remove()


def secret(folder: Path) -> Path:
    """A file of root's in a folder that is open to all."""
    path = folder / "secret"
    path.write_text("secret")
    path.chmod(0o600)
    return path


def given(outcome: Outcome) -> set[str]:
    """The names of the files that the rogue was given."""
    return {line.rsplit(" ", 1)[1] for line in outcome if line.startswith("chmod ")}


def assert_read_only(outcome: Outcome, names: set[str]) -> None:
    for name in names:
        assert {what: outcome[f"{what} {name}"] for what in READ_ONLY} == READ_ONLY
        assert outcome[f"chmod {name}"] == "EPERM"


def assert_closed(outcome: Outcome, paths: Sequence[Path]) -> None:
    """None of these files could be changed."""
    for path in paths:
        for what in BY_NAME[:-1]:
            assert outcome[f"{what} {path}"] == "EACCES", (what, path)


#: What there is no need for -> how it ends. Nothing of it may outlive who made it, or let it leave
#: its limits, its process or its rights.
NO_WAY_OUT = {
    **dict.fromkeys(("unix socket", "netlink socket", "socketpair"), "EACCES"),
    **dict.fromkeys(("io_uring", "clone3"), "ENOSYS"),
    **dict.fromkeys(("setuid", "setrlimit", "setrlimit, the old", "kill"), "EPERM"),
    **dict.fromkeys(("fork", "fork, the old", "clone", "unshare", "mount"), "EPERM"),
    **dict.fromkeys(("shmget", "semget", "msgget", "mq_open", "memfd_create"), "EPERM"),
    **dict.fromkeys(("userfaultfd", "perf_event_open", "bpf", "keyctl"), "EPERM"),
    "process_vm_readv": "EPERM",
}


def assert_no_way_out(outcome: Outcome, *, network: bool = False) -> None:
    assert {call: outcome[call] for call in NO_WAY_OUT} == NO_WAY_OUT
    ends = {outcome["tcp socket"], outcome["udp socket"]}
    assert ends == {"ok" if network else "EACCES"}


def assert_limited(outcome: Outcome, hardware: Hardware, spec: Launch, user: User | None) -> None:
    """It had no more than a VMM needs, and was not ended by it: QEMU would go on."""
    limit = vmm_limits.of_vmm(hardware, spec, user)
    if user:
        # Its own one counts, and the one that waits for an answer.
        assert int(outcome["threads"]) in (
            vmm_limits.threads(hardware) - 1,
            vmm_limits.threads(hardware) - 2,
        )
    assert 0 < int(outcome["open files"]) < limit[rlimits.OPEN_FILES]
    room = limit[rlimits.PRIVATE] // MIB
    assert room // 2 < int(outcome["private MiB"]) <= room
    both = int(outcome["private MiB"]) + int(outcome["shared MiB"])
    assert both <= limit[rlimits.ADDRESS_SPACE] // MIB
    assert outcome[f"flood {CONSOLE}"] == f"{LOG_ROOM} EFBIG"
    for name in (CONSOLE, QEMU):
        assert (spec.folder / name).stat().st_size == LOG_ROOM


def test_a_rogue_clone(
    host: Runtime,
    saved: Artifact,
    clones: Clones,
    rogue: Rogue,
    place: tuple[RunDirectory, int],
) -> None:
    (neighbour,) = clones(1)
    source = clone_plan(host, saved)
    folder, lease = place
    spec = launcher.launch_spec(host, source, folder.path, None)
    hardware = replace(source.hardware, segments=displayed(source.placed))
    theirs, blob = host.run / neighbour.name, source.source.layers[-1].path
    closed = [
        *(Path("/etc/passwd"), host.store.root / "index.json", Path(blob)),
        *(theirs / "console.log", theirs / "guest.json", theirs / "monitor.sock"),
        *(folder.path / "guest.json", Path("guest.json"), Path("qemu.log")),
    ]
    (folder.path / "guest.json").write_text("{}")
    unreadable = [
        *(secret(rogue.program.parent), Path("/etc/shadow"), Path("/etc/passwd")),
        Path(f"/proc/{neighbour.pid}/cmdline"),
    ]
    attempts: list[tuple[str, str | Path | int]] = [
        *(("write", path) for path in closed),
        *(("read", path) for path in unreadable),
        *(("make", path) for path in ("new", folder.path / "new", "/tmp/onecopy-new")),
        *(("unlink", path) for path in ("guest.json", "console.log", blob)),
        *(("list", path) for path in (".", "/", "/run", "/proc", host.store.root)),
        ("signal", neighbour.pid),
        ("ptrace", neighbour.pid),
        ("flood", CONSOLE),
    ]
    outcome = asyncio.run(run_rogue(rogue, hardware, spec, attempts, inherit=[lease]))
    files = given(outcome)
    assert len(files) == len(source.placed) + 1
    assert_read_only(outcome, files)
    if not spec.rom:
        assert_ram_was_given_read_only(outcome)
    assert_closed(outcome, closed)
    for what, word in attempts:
        if what in ("read", "make", "unlink", "list"):
            assert outcome[f"{what} {word}"] == "EACCES", (what, word)
    assert (outcome["signal"], outcome["ptrace"]) == ("EPERM", "EPERM")
    assert_no_way_out(outcome)
    assert_limited(outcome, hardware, spec, new_user("tcg"))
    assert exists(neighbour.pid)
    host.store.verify(saved)


def assert_ram_was_given_read_only(outcome: Outcome) -> None:
    """What it asked for as QEMU 7.2 does; and only once: nobody answers again."""
    assert (outcome["open as QEMU does"], outcome["it is open for"]) == ("ok", str(os.O_RDONLY))
    for what in set(READ_ONLY) - set(BY_NAME):
        assert outcome[f"{what} what came"] == READ_ONLY[what]
    assert outcome["open as QEMU does again"] == "waits"


def test_a_low_port_is_the_only_one(
    host: Runtime, saved: Artifact, rogue: Rogue, place: tuple[RunDirectory, int]
) -> None:
    """A rogue with a network, and the right to ports below 1024, has the published one."""
    if landlock.abi() < landlock.BINDS_SINCE:
        cannot_run("this kernel's Landlock knows no ports")
    given, *others = [port for port in range(1023, 600, -1) if _is_free(port)][:3]
    source = clone_plan(host, saved, publish=((given, 80),))
    folder, lease = place
    card = Nic("52:54:00:00:00:01", "198.18.1.0")
    spec = launcher.launch_spec(host, source, folder.path, card)
    hardware = replace(source.hardware, segments=displayed(source.placed))
    binds = [("bind", port) for port in (given, *others, 18080, 0)]
    reads = [("read", path) for path in ("/etc/resolv.conf", "/etc/passwd", "/etc/hostname")]
    outcome = asyncio.run(run_rogue(rogue, hardware, spec, [*binds, *reads], inherit=[lease]))
    # They are not there, or it may not read them.
    names, *beside = [outcome[f"read {path}"] for _, path in reads]
    assert names == "ok"
    if name_servers.can_hide() or not name_servers.opens_more():
        assert set(beside) <= {"ENOENT", "EACCES"}
    told = [outcome[f"bind {port}"] for _, port in binds]
    assert told == ["ok", "EACCES", "EACCES", "EACCES", "ok"]
    assert_no_way_out(outcome, network=True)


def test_qemu_makes_no_processes(clones: Clones, isolated: GuestRecord) -> None:
    """What our own filter leaves to it, if it is what starts QEMU: vfork and execve."""
    for guest in (*clones(1), isolated):
        filters = seccomp_filters(guest.pid)
        assert len(filters) == 2
        for number in (CLONE, FORK, VFORK, EXECVE):
            ends = [decide(program, number, signal.SIGCHLD) for program in filters]
            assert any(end >> 16 in DENYING for end in ends), (number, ends)


def test_the_blobs_of_a_saved_system_are_roots_and_read_only(
    host: Runtime, saved: Artifact
) -> None:
    for layer in saved.layers:
        told = layer.path.stat()
        assert (told.st_uid, told.st_gid, told.st_mode & 0o777) == (0, 0, 0o444)


@pytest.fixture
def others_store(host: Runtime) -> Iterator[Path]:
    """A folder of an ordinary user, whose store has a kernel and tools, and a root to build."""
    with tempfile.TemporaryDirectory(prefix="onecopy-user-") as folder:
        home = Path(folder)
        (home / "bin").mkdir()
        store = Store(home / "store")
        for artifact in (ensure_kernel(host.store), ensure_tools(host.store)):
            copy_artifact(artifact, store)
        root = home / "root/bin"
        root.mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "busybox")
        (root / "sh").symlink_to("busybox")
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        yield home


def test_an_ordinary_user(others_store: Path, rogues: dict[str, Rogue]) -> None:
    """Builds, saves, runs, executes, stops in a store of their own, and is as well protected."""
    kvm = [KVM.stat().st_gid] if KVM.exists() and KVM.stat().st_gid else []
    told = as_nobody(lambda: asyncio.run(_as_user(others_store, rogues)), kvm)
    assert ACCEL in (None, told["accel"])
    assert told["answers"] == {"user-1": "user-1", "user-2": "user-2"}
    assert told["forked"] == [True, True]
    assert told["users"] == [NOBODY, NOBODY]
    assert told["seccomp"] == ["2", "2"]
    assert told["accounts"] == ["", ""]
    assert told["stopped"] == ["SHUT_DOWN", "SHUT_DOWN"]
    assert told["left"] == []
    assert told["segments"] == ["mine", "----", "mine"]
    for outcome in told["outcomes"]:
        assert_read_only(outcome, given(outcome))
        if told["asks"]:
            assert_ram_was_given_read_only(outcome)
        assert (outcome["signal"], outcome["ptrace"]) == ("EPERM", "EPERM")
        assert_closed(outcome, [Path(path) for path in told["closed"]])
        assert {outcome[f"unlink {path}"] for path in told["closed"]} == {"EACCES"}
        assert_no_way_out(outcome)


async def _as_user(home: Path, rogues: dict[str, Rogue]) -> dict[str, object]:
    os.environ |= {"ONECOPY_HOME": str(home / "store"), "XDG_RUNTIME_DIR": str(home / "run")}
    os.environ["HOME"] = str(home)
    host = Runtime.open()
    build_segment(host.store, Reference("root"), f"dir:{home / 'root'}")
    # Not everywhere may other users have tap devices.
    spec = BootSpec(root=Reference("root"), memory=128 * MIB, command="", allow_host=True)
    system = (await save_system(host, Reference("user"), spec)).artifact
    clones = CloneSpec(system=Reference.parse(system.ref), allow_host=True)
    request = start.Request(clones, 2, "user", overcommit=True)
    started = await start.start(host, start.plan(host, request), refill=False)
    try:
        return await _what_they_do(host, system, started.guests, rogues)
    finally:
        for record in host.guests():
            host.end(record)


async def _what_they_do(
    host: Runtime, system: Artifact, guests: Sequence[GuestRecord], rogues: dict[str, Rogue]
) -> dict[str, object]:
    answers = {}
    for guest in guests:
        done = await run_captured(host.run / guest.name, ["hostname"], timeout=60)
        answers[guest.name] = done.stdout.decode().strip()
    segments = await _segments_of_user(host, guests)
    found = [await _rogue_of_user(host, system, guests[0], each) for each in rogues.values()]
    result: dict[str, object] = {
        "accel": guests[0].accel,
        "segments": segments,
        "asks": not host.qemu.rom,
        "accounts": [measure(maps).note for maps in guest_maps(guests)],
        "answers": answers,
        "forked": [guest.forked for guest in guests],
        "outcomes": [outcome for outcome, _ in found],
        "closed": found[0][1],
        "users": [int(status(guest)["Uid"].split()[0]) for guest in guests],
        "seccomp": [status(guest)["Seccomp"] for guest in guests],
        "stopped": [each.how.name for each in await stop_guests(host, guests, 60)],
    }
    host.store.verify(system)
    return result | {"left": [record.holder for record in host.store.leases()]}


async def _segments_of_user(host: Runtime, guests: Sequence[GuestRecord]) -> list[str]:
    """What the second guest finds of what the first wrote: in common, its own, and committed."""
    ranges = [NewRange(each, HUGE_PAGE_SIZE) for each in (PageClass.SW, PageClass.EW)]
    create_segment(host.store, Reference("two"), ranges)
    for guest in guests:
        await attach(host, guest.name, Reference("two"))
    first, second = (host.run / guest.name for guest in guests)
    write = "for d in two two.1; do printf mine | dd of=/dev/onecopy/$d conv=fsync; done"
    await run_captured(first, ["sh", "-c", write], timeout=60)
    read = "for d in two two.1; do head -c 4 /dev/onecopy/$d | tr '\\0' -; echo; done"
    found = (await run_captured(second, ["sh", "-c", read], timeout=60)).stdout.decode().split()
    done = await commit(host, guests[0].name, "two")
    return [*found, done.artifact.layer("range1").path.read_bytes()[:4].decode()]


async def _rogue_of_user(
    host: Runtime, system: Artifact, neighbour: GuestRecord, rogue: Rogue
) -> tuple[Outcome, list[str]]:
    """What it came to, and the files that it tried to write and to unlink."""
    source = clone_plan(host, system)
    ram = system.layer("ram").path
    theirs = host.run / neighbour.name
    closed = [
        *(str(host.store.root / "index.json"), str(ram)),
        *(str(theirs / "guest.json"), str(theirs / "console.log")),
    ]
    attempts: list[tuple[str, str | Path | int]] = [
        *(("write", path) for path in closed),
        *(("unlink", path) for path in closed),
        ("signal", neighbour.pid),
        ("ptrace", neighbour.pid),
        ("flood", CONSOLE),
    ]
    with host.batch() as batch, host.claim("rogue", [system.digest], batch) as (folder, lease):
        prepare(folder.path)
        spec = launcher.launch_spec(host, source, folder.path, None)
        # Even if nothing else kept its owner from writing to it.
        ram.chmod(0o644)
        hardware = replace(source.hardware, segments=displayed(source.placed))
        outcome = await run_rogue(rogue, hardware, spec, attempts, inherit=[lease.fd])
        ram.chmod(0o444)
        assert_limited(outcome, hardware, spec, None)
        folder.remove()
    return outcome, closed
