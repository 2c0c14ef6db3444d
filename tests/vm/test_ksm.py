"""This host's own KSM, set and running; no guest is started.

These tests are here because KSM merges the pages of all processes: nothing that measures the memory
of guests may run at the same time (script/test runs tests/vm one after another).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from onecopy.errors import InvalidInput
from onecopy.linux.counters import ksm, smaps
from onecopy.model import PAGE_SIZE as PAGE
from onecopy.sharing.account import GuestMaps, measure
from onecopy.sharing.ram_scan import scan
from tests.conftest import cannot_run

# Two mappings of 64 equal pages, open to merging, with a page that is not mapped on each side.
MERGEABLE = """
import ctypes, mmap
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size = 128 * 4096
start = libc.mmap(None, ctypes.c_size_t(size + 8192), 0, 0x22, -1, ctypes.c_long(0)) + 4096
assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), 3) == 0
assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 12) == 0
half = b''.join(bytes([7, n]) * 2048 for n in range(64))
ctypes.memmove(start, half + half, size)
print(flush=True)
input()
"""


def test_merged_pages_are_not_this_guests_alone() -> None:
    if os.geteuid() or ksm.read() is None:
        cannot_run("running KSM needs root and a kernel with KSM")
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", MERGEABLE]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            maps = GuestMaps("guest", process.pid, None, 128 * PAGE)
            before = measure(maps)
            assert (before.ram_private, before.ksm) == (128 * PAGE, 0)
            with ksm.settings({"pages_to_scan": 20000, "sleep_millisecs": 5, "run": 1}):
                until = time.monotonic() + 120
                while (after := measure(maps)).ksm != 128 * PAGE:
                    assert time.monotonic() < until, after
                    time.sleep(0.05)
            scanned = scan(maps)
            assert (scanned.merged, scanned.own) == (128 * PAGE, 0)
            if any(m.ksm for m in smaps.read(process.pid)):
                assert after.ram_private == 0
            told = ksm.read_process(process.pid)
            assert told.merging_pages is None or told.merging_pages >= 64
        finally:
            process.kill()


def test_ksm_settings_are_held_and_restored() -> None:
    before = ksm.read()
    if os.geteuid() or before is None or before.sleep_millisecs is None:
        cannot_run("setting KSM needs root and a kernel with KSM")
    other = before.sleep_millisecs + 1
    with ksm.settings({"sleep_millisecs": other}):
        held = ksm.read()
        assert held and held.sleep_millisecs == other
    # The kernel itself refuses run=7.
    with (
        pytest.raises(InvalidInput, match="run"),
        ksm.settings({"sleep_millisecs": other, "run": 7}),
    ):
        pass
    after = ksm.read()
    assert after and after.sleep_millisecs == before.sleep_millisecs
