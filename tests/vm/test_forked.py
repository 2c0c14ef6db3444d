"""VMMs that a fork server started: they share QEMU's memory, know no other guest, and are not lost.

Not here: their confinement (test_confinement.py), and QEMUs without guests (tests/unit/vmm).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux.counters import pagemap, smaps
from onecopy.linux.counters.smaps import Mapping
from onecopy.model import MIB, PAGE_SIZE
from onecopy.store import Artifact
from tests.vm.forks import server_of, servers
from tests.vm.guests import Guests
from tests.vm.physical import private


def frames(guest: GuestRecord, wanted: Callable[[Mapping], bool]) -> dict[int, int]:
    """Return address -> page frame of a VMM's anonymous pages in some of its mappings."""
    found = {}
    for each in smaps.read(guest.pid):
        if wanted(each):
            entries = pagemap.read(guest.pid, each.start, each.size // PAGE_SIZE)
            for number, entry in enumerate(entries):
                frame = pagemap.pfn(entry)
                if private(entry) and frame:
                    found[each.start + number * PAGE_SIZE] = frame
    return found


def is_relocated(mapping: Mapping) -> bool:
    return "qemu-system" in mapping.path and "w" not in mapping.perms


def is_heap(mapping: Mapping) -> bool:
    return mapping.path == "[heap]"


def test_two_vmms_of_a_server_have_the_same_physical_pages(guests: Guests, saved: Artifact) -> None:
    one, two = (each.record for each in guests.clone(saved, 2))
    apart = [each.record for each in guests.clone(saved, 2, isolated_vmm=True)]
    assert one.forked and two.forked and server_of(one.pid) == server_of(two.pid)
    assert [(each.forked, each.why_exec) for each in apart] == [(False, "requested")] * 2
    assert [server_of(each.pid) for each in apart] == [None, None]
    for wanted, part in ((is_relocated, 0.9), (is_heap, 0.1)):
        first, second, third, fourth = (frames(each, wanted) for each in (one, two, *apart))
        same = first.items() & second.items()
        assert len(same) > part * len(first) > 0
        # The measurement can fail: these have the same content, in pages of their own.
        assert len(third) > part * len(first)
        assert not set(third.values()) & {*first.values(), *second.values(), *fourth.values()}


def found_in(pid: int, texts: Sequence[bytes]) -> set[bytes]:
    """Return those of ``texts`` that are anywhere in the memory that a process may read."""
    found, longest = set(), max(map(len, texts))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for each in smaps.read(pid):
            if not each.perms.startswith("r") or each.path.startswith("[v"):
                continue
            memory.seek(each.start)
            tail = b""
            for at in range(0, each.size, 16 * MIB):
                try:
                    data = tail + memory.read(min(16 * MIB, each.size - at))
                except OSError:  # beyond the end of a file
                    break
                found |= {text for text in texts if text in data}
                tail = data[-longest:]
    return found


def test_the_secrets_of_a_guest_are_in_no_other_process(
    guests: Guests, saved: Artifact, tmp_path: Path
) -> None:
    name, disk, inside = (f"secret-{os.urandom(6).hex()}" for _ in range(3))
    (tmp_path / disk).write_bytes(bytes(MIB))
    # A server that has already forked one, and forks one later.
    (before,) = guests.clone(saved)
    (one,) = guests.clone(saved, name=name, disks=[str(tmp_path / disk)])
    keep = f"import time; text = bytes.fromhex('{inside.encode().hex()}'); time.sleep(1000)"
    one.exec(["sh", "-c", f'exec python3 -c "{keep}" >/dev/null 2>&1 &'])
    (after,) = guests.clone(saved)
    server = server_of(one.record.pid)
    assert server and server == server_of(before.record.pid) == server_of(after.record.pid)
    secrets = [secret.encode() for secret in (name, disk, inside)]
    assert {secrets[0], secrets[2]} <= found_in(one.record.pid, secrets)
    for pid in (server, before.record.pid, after.record.pid):
        assert found_in(pid, secrets) == set(), pid


def test_all_come_up_while_their_servers_are_killed(
    host: Runtime, guests: Guests, saved: Artifact
) -> None:
    guests.clone(saved)
    over, killed = threading.Event(), set()

    def kill() -> None:
        while not over.wait(0.03):
            for pid in servers(host):
                with suppress(FileNotFoundError, ProcessLookupError):
                    # On a busy host one would not come to fork any.
                    if Path(f"/proc/{pid}/task/{pid}/children").read_text():
                        os.kill(pid, signal.SIGKILL)
                        killed.add(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = guests.clone(saved, 12)
    finally:
        over.set()
        killer.join()
    assert len(killed) > 2
    for each in found:
        assert each.exec(["hostname"]).text.strip() == each.name
        assert each.record.forked or each.record.why_exec
    assert any(each.record.forked for each in found)
    # And the next one has a server again.
    assert server_of(guests.clone(saved)[0].record.pid)
