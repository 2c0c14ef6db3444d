"""What a VMM may, where it can be told without one: the filter, the rules, the users.

Not here: that the kernel keeps to it (tests/vm/test_confinement.py).
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from onecopy.errors import Incompatible, NotPermitted
from onecopy.guest.observe import doctor
from onecopy.guest.ports import require_free
from onecopy.linux import cgroup
from onecopy.linux.sandbox import landlock, rlimits, seccomp
from onecopy.linux.sandbox.landlock import TRUNCATE
from onecopy.linux.syscall import prctl
from onecopy.vmm import vmm_user
from onecopy.vmm.confine import Confinement, filter_program
from onecopy.vmm.spawn import start
from tests.unit.bpf import decide
from tests.unit.other_user import as_nobody

I386 = 0x40000003
OPENAT, SOCKET = 257, 41
ROOT_HAS = "000001ffffffffff"


def failing(error: int) -> int:
    return seccomp.ERROR | error


def confinement(**options: Any) -> Confinement:
    return Confinement(None, 0, {}, kvm=False, **{"asks": False, **options})


@pytest.mark.parametrize("asks", [False, True])
def test_the_filter(asks: bool) -> None:
    program = filter_program(confinement(asks=asks, inet=True))
    asked = seccomp.ASK if asks else seccomp.ALLOW
    at = -100 & (1 << 64) - 1  # AT_FDCWD
    table = {
        (OPENAT, at, 0, os.O_RDWR): asked,
        (OPENAT, at, 0, os.O_RDWR | os.O_CLOEXEC): seccomp.ALLOW,
        (OPENAT, at, 0, os.O_RDONLY): seccomp.ALLOW,
        # The kernel takes an int of it.
        (OPENAT, at, 0, os.O_RDWR | 1 << 32): asked,
        (2, 0, os.O_RDWR): asked,
        (2, 0, os.O_RDONLY, os.O_RDWR): seccomp.ALLOW,
        (SOCKET, socket.AF_INET): seccomp.ALLOW,
        (SOCKET, socket.AF_INET6): seccomp.ALLOW,
        (SOCKET, socket.AF_UNIX): failing(errno.EACCES),
        (SOCKET, socket.AF_NETLINK): failing(errno.EACCES),
        (SOCKET, socket.AF_UNIX | 1 << 32): failing(errno.EACCES),
        (SOCKET, socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP): seccomp.ALLOW,
        (SOCKET, socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP): seccomp.ALLOW,
        (SOCKET, socket.AF_UNIX, socket.SOCK_STREAM, 0): failing(errno.EACCES),
        # MPTCP and SMC.
        (SOCKET, socket.AF_INET, socket.SOCK_STREAM, 262): failing(errno.EACCES),
        (SOCKET, socket.AF_INET6, socket.SOCK_STREAM, 256): failing(errno.EACCES),
        (53, socket.AF_UNIX): failing(errno.EACCES),
        (425,): failing(errno.ENOSYS),
        (91, 3, 0o666): failing(errno.EPERM),
        (28, 0, 4096, mmap.MADV_HUGEPAGE): failing(errno.EINVAL),
        (28, 0, 4096, mmap.MADV_MERGEABLE): seccomp.ALLOW,
        # Of x32, and of no call that there is.
        (0x40000000 | SOCKET, socket.AF_INET): failing(errno.ENOSYS),
        (-1,): failing(errno.ENOSYS),
        (0,): seccomp.ALLOW,
        # A thread, another process, and what starts the VMM itself.
        (56, 0x3D0F00): seccomp.ALLOW,
        (56, 0x1200011): failing(errno.EPERM),
        (57,): failing(errno.EPERM),
        (87,): failing(errno.EACCES),
        (203,): failing(errno.EPERM),
        (280,): failing(errno.EPERM),
        (58,): seccomp.ALLOW,
        (435,): failing(errno.ENOSYS),
        # A limit that is read, and one that is set; also far up in memory.
        (302, 0, 7, 0): seccomp.ALLOW,
        (302, 0, 7, 0x1000): failing(0),
        (302, 0, 7, 0x7F0000000000): failing(0),
    }
    assert {call: decide(program, *call) for call in table} == table
    assert decide(program, OPENAT, at, 0, os.O_RDWR, arch=I386) == seccomp.KILL


#: shmget, semget, msgget, mq_open; ptrace, process_vm_writev, kill; mount, setrlimit,
#: perf_event_open, bpf, userfaultfd, memfd_create, unshare, setns, io_setup, keyctl, kexec_load,
#: init_module.
DENIED = (29, 64, 68, 240, 101, 311, 62, 165, 160, 298, 321, 323, 319, 272, 308, 206, 250, 246, 175)


def test_what_no_vmm_needs() -> None:
    program = filter_program(confinement())
    assert {decide(program, number) for number in DENIED} == {failing(errno.EPERM)}
    # Without a network not even these.
    assert decide(program, SOCKET, socket.AF_INET) == failing(errno.EACCES)
    # What comes with a later Linux is unknown, but for what the C library may use.
    table = {423: seccomp.ALLOW, 436: seccomp.ALLOW, 441: seccomp.ALLOW, 462: seccomp.ALLOW}
    table |= dict.fromkeys((424, 434, 437, 438, 440, 442, 463 + 1, 1000), failing(errno.ENOSYS))
    assert {number: decide(program, number) for number in table} == table


def test_landlock_attributes_grow_with_the_abi() -> None:
    sizes = {version: len(landlock.attributes(version)) for version in range(1, 9)}
    assert sizes == {1: 8, 2: 8, 3: 8, 4: 16, 5: 16, 6: 24, 7: 24, 8: 24}
    assert not landlock.handled(2) & TRUNCATE
    assert landlock.handled(3) & TRUNCATE
    for version in range(1, 9):
        (files,) = struct.unpack_from("Q", landlock.attributes(version))
        assert files == landlock.handled(version)
    # Where QEMU connects to stays free; where it listens is said if it is to be.
    assert struct.unpack("QQQ", landlock.attributes(8))[1:] == (0, 0b11)
    assert struct.unpack("QQQ", landlock.attributes(8, binds=True))[1:] == (0b01, 0b11)
    assert landlock.attributes(3, binds=True) == landlock.attributes(3)


def host(root: Path, maps: str, capabilities: str = ROOT_HAS) -> Path:
    folder = root / "proc/self"
    folder.mkdir(parents=True)
    (folder / "uid_map").write_text(maps)
    (folder / "gid_map").write_text(maps)
    (folder / "status").write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")
    return root


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ("         0          0 4294967295\n", 0x70000000),
        ("         0     100000      65536\n", 61184),
        ("0 100000 1000\n1000 200000 64536\n", 61184),
        ("         0       1000          1\n", None),
    ],
)
def test_users_are_those_that_exist_here(tmp_path: Path, maps: str, expected: int | None) -> None:
    root = host(tmp_path, maps)
    found = vmm_user._usable_range(root)
    assert (found.start if found else None) == expected
    assert bool(vmm_user.why_not("tcg", root)) == (expected is None)


def test_root_without_its_capabilities_stays_who_it_is(tmp_path: Path) -> None:
    root = host(tmp_path, "0 0 4294967295\n", "00000000a80425fa")
    assert "may not become" in vmm_user.why_not("tcg", root)


@pytest.mark.parametrize(
    ("mode", "group", "usable", "groups"),
    [
        (0o660, 107, True, (107,)),
        (0o666, 0, True, ()),
        (0o600, 0, False, ()),
        (0o660, 0, False, ()),
    ],
)
def test_the_group_of_dev_kvm(
    mode: int, group: int, usable: bool, groups: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        def stat(self) -> os.stat_result:
            return os.stat_result((mode, 0, 0, 1, 0, group, 0, 0, 0, 0))

    monkeypatch.setattr(vmm_user, "KVM", Device())
    assert (vmm_user.why_not("kvm") == "") == usable
    assert vmm_user._groups("kvm") == groups
    assert vmm_user._groups("tcg") == ()


def test_a_low_port_takes_a_capability(tmp_path: Path) -> None:
    root = host(tmp_path, "")
    assert vmm_user.port_capabilities([8080, 0], root) == 0
    assert vmm_user.port_capabilities([8080, 80], root) == 1 << 10
    limit = root / "proc/sys/net/ipv4/ip_unprivileged_port_start"
    limit.parent.mkdir(parents=True)
    limit.write_text("80\n")
    assert vmm_user.port_capabilities([80], root) == 0
    (root / "proc/self/status").write_text("CapEff:\t0000000000000000\n")
    assert vmm_user.port_capabilities([79], root) == 0


def test_a_low_port_of_an_ordinary_user() -> None:
    def try_it() -> str:
        try:
            require_free(((79, 80),))
        except NotPermitted as error:
            return error.hint
        return "no error"

    assert "give a higher port" in as_nobody(try_it)


@pytest.fixture
def plain() -> Confinement:
    return Confinement(None, 0, {}, kvm=False, asks=False)


def test_only_what_is_passed_is_inherited(plain: Confinement, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    stray = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(stray, True)
    try:
        with (tmp_path / "out").open("wb") as out:
            # The shell expands it by itself: no program is started, whose rights we would need.
            script = "for fd in 0 1 2 $1 $2 $3; do { true <&$fd; } 2<&0 && echo $fd; done; :"
            argv = ["/bin/bash", "-c", script, "sh", *map(str, (reading, writing, stray))]
            process = start(argv, plain, tmp_path, out.fileno(), [writing]).process
        assert process.wait() == 0
        assert (tmp_path / "out").read_text().split() == ["0", "1", "2", str(writing)]
        flags = [os.get_inheritable(fd) for fd in (reading, writing, stray)]
        assert flags == [False, False, True]
    finally:
        for fd in (reading, writing, stray):
            os.close(fd)


def test_we_stay_as_we_were(plain: Confinement, tmp_path: Path) -> None:
    before = _ourselves()
    mine = Confinement(vmm_user.new_user("tcg"), 0, {}, kvm=False, asks=False)
    for confinement in (plain, mine):
        with (tmp_path / "out").open("wb") as out:
            assert start(["/bin/true"], confinement, tmp_path, out.fileno(), []).process.wait() == 0
    assert _ourselves() == before


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_program_is_limited_and_goes_on(
    before: signal.Handlers, plain: Confinement, tmp_path: Path
) -> None:
    """Its files do not grow, which is an error and does not end it; whatever we do with that."""
    limit = {rlimits.FILE_SIZE: 1 << 16, rlimits.CORE: 0}
    argv = ["/bin/bash", "-c", "while echo something; do :; done 2>&-; exit 7"]
    was = signal.signal(signal.SIGXFSZ, before)
    try:
        for who in (None, vmm_user.new_user("tcg")):
            confinement = replace(plain, user=who, limits=limit)
            with (tmp_path / "out").open("wb") as out:
                process = start(argv, confinement, tmp_path, out.fileno(), []).process
                assert process.wait(60) == 7
            assert (tmp_path / "out").stat().st_size == 1 << 16
        assert signal.getsignal(signal.SIGXFSZ) == before
        ignored = re.search(
            r"^SigIgn:\s+(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        assert ignored
        assert bool(int(ignored[1], 16) >> 24 & 1) == (before is signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGXFSZ, was)


def _ourselves() -> tuple[list[str], str, list[int]]:
    keys = ("Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp", "Umask")
    status = Path("/proc/self/status").read_text().splitlines()
    switches = [prctl(3), prctl(42)]  # dumpable, no huge pages
    return [line for line in status if line.startswith(keys)], str(Path.cwd()), switches


def test_a_kernel_that_refuses_is_told(
    plain: Confinement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(seccomp, "install", refuse)
    with (tmp_path / "out").open("wb") as out, pytest.raises(Incompatible) as caught:
        start(["/bin/true"], plain, tmp_path, out.fileno(), [])
    assert "Device or resource busy" in caught.value.message


def test_doctor_tells_how_guests_are_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 7)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert doctor._confinement("tcg").state == "ok"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(vmm_user, "why_not", lambda _: "")
    assert "Landlock ABI 7" in doctor._confinement("tcg").says
    monkeypatch.setattr(vmm_user, "why_not", lambda _: "a reason")
    assert doctor._confinement("tcg").state == "limited"
    monkeypatch.setattr(vmm_user, "why_not", lambda _: "")
    monkeypatch.setattr(landlock, "abi", lambda: 3)
    assert "below 1024" in doctor._confinement("tcg").says
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    assert doctor._confinement("tcg").state == "limited"


def test_doctor_tells_how_guests_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "why_not", lambda: "")
    assert doctor._limits().state == "ok"
    monkeypatch.setattr(cgroup, "why_not", lambda: "a reason")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (doctor._limits().state, "threads" in doctor._limits().says) == ("limited", False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "a reason; threads are not limited" in doctor._limits().says


def test_a_host_without_landlock_still_starts_programs(
    plain: Confinement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    with (tmp_path / "out").open("wb") as out:
        argv = [sys.executable, "-c", "print(open('/etc/passwd').read()[:4])"]
        process = start(argv, plain, tmp_path, out.fileno(), []).process
    assert process.wait() == 0
    assert isinstance(process, subprocess.Popen)
    assert (tmp_path / "out").read_text() == "root\n"
