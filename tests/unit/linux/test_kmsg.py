"""The kernel's log: what it says of processes that it ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onecopy.linux import kmsg
from onecopy.linux.kmsg import Death, of, parse
from tests.conftest import cannot_run

GROUP = (
    "3,2042,11537572895,-;Memory cgroup out of memory: Killed process 3182 (qemu-system-x86) "
    "total-vm:1688908kB, anon-rss:18648kB, file-rss:49680kB, shmem-rss:0kB, UID:2002008266 "
    "pgtables:388kB oom_score_adj:0"
)
HOST = GROUP.replace("Memory cgroup out of memory", "Out of memory")
OLD = "3,7,5000000,-;Out of memory: Killed process 12 (qemu-system-x86) total-vm:1kB, anon-rss:1kB"
CRASH = (
    "6,9,8000000,-;qemu-system-x86[44]: segfault at 18 ip 00007f1 sp 00007ffd error 4 in libc.so.6"
)
TRAP = "6,9,8000000,-;traps: qemu-system-x86[44] general protection fault ip:55 sp:7ff error:0"


@pytest.mark.parametrize(
    ("record", "death"),
    [
        (GROUP, Death(3182, 2002008266, 11537.572895, "out of memory in its control group")),
        (HOST, Death(3182, 2002008266, 11537.572895, "out of memory")),
        (OLD, Death(12, None, 5.0, "out of memory")),
        (CRASH, Death(44, None, 8.0, "segfault at 18")),
        (TRAP, Death(44, None, 8.0, "general protection fault")),
        ("6,1,2,-;erofs (device loop0): mounted with root inode @ nid 36.", None),
        # Written by a process, which the kernel gives another facility.
        (f"12{GROUP[1:]}", None),
        ("", None),
        (";;", None),
        ("x,y,z;Out of memory: Killed process 1 (a)", None),
    ],
)
def test_records(record: str, death: Death | None) -> None:
    assert parse(record) == death


def test_only_that_process() -> None:
    found = [death for each in (OLD, GROUP) if (death := parse(each))]
    assert of(found, 3182, 2002008266, began=11000) == found[1]
    # Another user's, another one's, one that had the number before.
    assert of(found, 3182, 0, began=11000) is None
    assert of(found, 3183, 2002008266, began=11000) is None
    assert of(found, 3182, 2002008266, began=10**9) is None
    assert of(found, 12, 7, began=1) == found[0]


def test_this_kernel_s() -> None:
    try:
        os.close(os.open(kmsg.PATH, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        cannot_run(f"this user may not read the kernel's log: {error}")
    assert all(death.why for death in kmsg.deaths())
    assert kmsg.deaths(Path("/no/such")) == []
