"""A fork server with this host's QEMU: what its VMMs are, and what is not in them.

Not here: servers that fail or end (test_fork_server_fails.py), and guests that run (tests/vm).
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from onecopy.guest.observe import accounts
from onecopy.linux import process
from onecopy.linux.counters import pagemap, smaps
from onecopy.linux.sandbox import rlimits, seccomp
from onecopy.model import PAGE_SIZE
from onecopy.sharing import report
from onecopy.subprocesses import find_program
from onecopy.vmm import external_qemu, fork_registry, fork_request, vmm_user
from onecopy.vmm.confine import filter_program
from onecopy.vmm.fork_server import ForkServer
from onecopy.vmm.qemu import BINARY
from onecopy.vmm.spawn import start
from tests.conftest import cannot_run
from tests.unit.bpf import decide
from tests.unit.vmm.fork_kit import PATIENCE, Vmm, confinement, servers, vmm

#: What must be equal however a VMM was started.
CREDENTIALS = re.compile(
    r"^(Umask|Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|"
    r"Seccomp_filters|SigBlk|SigIgn|SigCgt|Cpus_allowed|THP_enabled):.*",
    re.MULTILINE,
)


def status(found: Vmm) -> list[str]:
    lines = [each.group() for each in CREDENTIALS.finditer(found.read("status"))]
    # Each is a user of its own.
    return [re.sub(r"\b\d{10}\b", "USER", line) for line in lines]


def test_a_forked_vmm_is_what_one_by_exec_is(server: ForkServer, tmp_path: Path) -> None:
    limits = {rlimits.FILE_SIZE: 1 << 16, rlimits.CORE: 0, rlimits.OPEN_FILES: 512}
    given = {"limits": limits, "capabilities": vmm_user.port_capabilities([80])}
    with vmm(tmp_path / "a", server, **given) as forked:
        assert not forked.started.why_exec
        with vmm(tmp_path / "b", None, **given) as executed:
            assert status(forked) == status(executed)
            assert forked.read("limits") == executed.read("limits")
            assert forked.descriptors() == executed.descriptors()
            assert len(forked.read("cmdline").split("\0")) == len(
                executed.read("cmdline").split("\0")
            )
            assert os.getsid(forked.pid) == forked.pid
            for name in ("cwd", "root", "exe"):
                links = [Path(f"/proc/{each.pid}/{name}").readlink() for each in (forked, executed)]
                assert links[0].name.replace("a", "b") == links[1].name
            users = {each.read("status").split("Uid:")[1].split()[0] for each in (forked, executed)}
            assert len(users) == (2 if os.geteuid() == 0 else 1)
    assert forked.process.returncode == executed.process.returncode == -signal.SIGKILL


def test_each_thread_is_confined(server: ForkServer, tmp_path: Path) -> None:
    with vmm(tmp_path / "a", server) as forked:
        tasks = Path(f"/proc/{forked.pid}/task").iterdir()
        threads = [(each / "status").read_text() for each in tasks]
        assert len(threads) > 2
        for wanted in ("Uid", "CapEff", "CapPrm", "NoNewPrivs", "Seccomp", "Seccomp_filters"):
            found = {re.findall(rf"^{wanted}:.*", text, re.MULTILINE)[0] for text in threads}
            assert len(found) == 1


def test_two_of_a_server_share_pages_and_no_random_numbers(
    server: ForkServer, tmp_path: Path
) -> None:
    device = "-device", "vmgenid,guid=auto"
    with vmm(tmp_path / "a", server, *device) as one, vmm(tmp_path / "b", server, *device) as other:
        first, second = (each.execute("query-vm-generation-id")["guid"] for each in (one, other))
        assert first != second
        assert len(servers(tmp_path / "base")) == 1
        private = [_private(each.pid) for each in (one, other)]
        with vmm(tmp_path / "c", None, *device) as executed:
            assert max(private) < _private(executed.pid) * 0.8


def _private(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+:\s+(\d+)", text, re.MULTILINE)))


def test_the_server_is_no_guest_and_no_other_qemu(
    server: ForkServer, base: Path, tmp_path: Path
) -> None:
    blue = replace(server, store="store", domain="blue")
    with vmm(tmp_path / "a", blue) as one, vmm(tmp_path / "b", blue):
        (pid,) = fork_registry.pids()
        (found,) = fork_registry.running()
        assert (found.process.pid, found.store, found.domain) == (pid, "store", "blue")
        assert process.cmdline(pid)[1:] == ["-machine", "none", "-fork-server"]
        others = {each.pid for each in external_qemu.find(()).vmms}
        assert one.pid in others and pid not in others
        (maps,) = accounts.server_maps()
        (account,) = report.collect([], servers=[maps]).servers
        assert (account.name, account.ram_private) == ("blue", 0)
        # Most of its memory is its children's, too.
        assert (account.vmm_shared or 0) > (account.vmm_private or 0) > 0
    # A store's end is the end of its servers.
    fork_registry.end("another store")
    assert fork_registry.pids() == [pid]
    fork_registry.end("store")
    assert not found.process.lives()
    assert list((base / "forks").iterdir()) == []


def test_memory_is_counted_once(server: ForkServer, base: Path, tmp_path: Path) -> None:
    """All that a server and its VMMs have is what their pages say (pagemap)."""
    if os.geteuid():
        cannot_run("page frame numbers need root")
    with vmm(tmp_path / "a", server) as one, vmm(tmp_path / "b", server) as other:
        # A connection would fork a child, which would have its part for a moment.
        (pid,) = fork_registry.pids()
        pids = [pid, one.pid, other.pid]
        deadline = time.monotonic() + PATIENCE
        frames = counted = None
        # VMMs that have just started give memory back.
        while frames is None or frames != [set(_anonymous_frames(each)) for each in pids]:
            assert time.monotonic() < deadline
            frames = [set(_anonymous_frames(each)) for each in pids]
            counted = [_rollup(each).anonymous for each in pids]
        everything = len(set.union(*frames)) * PAGE_SIZE
        assert counted and sum(counted) == pytest.approx(everything, rel=0.01)
        shared = len(set.intersection(*frames)) * PAGE_SIZE
        assert shared > everything / 4
        # Without the server, its part of these pages would be missing.
        assert sum(counted[1:]) < everything - shared / 4


def _rollup(pid: int) -> smaps.Rollup:
    found = smaps.read_rollup(pid)
    assert found
    return found


def _anonymous_frames(pid: int) -> Iterator[int]:
    for each in smaps.read(pid):
        if each.anonymous:
            for entry in pagemap.read(pid, each.start, each.size // PAGE_SIZE):
                if pagemap.present(entry) and not pagemap.file_or_shared(entry):
                    yield pagemap.pfn(entry) or 0


def test_nothing_of_another_guest_or_of_its_creator_is_in_a_vmm(
    server: ForkServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"the-name-of-the-first-guest-{os.urandom(8).hex()}".encode()
    secret = f"a-secret-of-the-command-{os.urandom(8).hex()}".encode()
    monkeypatch.setenv("SECRET", secret.decode())
    with (
        vmm(tmp_path / "a", server, "-name", name.decode()) as one,
        vmm(tmp_path / "b", server) as other,
    ):
        (pid,) = servers(base)
        assert _contains(one.pid, name)
        for each in (pid, other.pid):
            assert not _contains(each, name)
            assert not _contains(each, secret)


def _contains(pid: int, text: bytes) -> bool:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            begin, end = (int(each, 16) for each in span.split("-"))
            if rights.startswith("rw"):
                memory.seek(begin)
                if text in memory.read(end - begin):
                    return True
    return False


def test_a_vmm_that_qemu_refuses_has_its_exit_code(server: ForkServer, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as out:
        argv = [find_program(BINARY), "-no-such-option"]
        process = start(argv, confinement(), tmp_path, out.fileno(), [], server).process
        assert process.wait(PATIENCE) == 1
    assert "no-such-option" in (tmp_path / "log").read_text()


def test_a_forked_vmm_may_start_no_program() -> None:
    program = filter_program(confinement(), executes=False)
    assert {decide(program, number) for number in (57, 58, 59)} == {seccomp.ERROR | errno.EPERM}
    assert decide(program, 56, 0x3D0F00) == seccomp.ALLOW


@pytest.mark.parametrize("count", [fork_request._MOST_WORDS + 1])
def test_too_long_a_command_line_is_not_served(count: int) -> None:
    words: Sequence[str] = ["word"] * count
    with pytest.raises(fork_request.Unserved, match="too many parts"):
        fork_request.pack(words, confinement(), [], rules=False)
