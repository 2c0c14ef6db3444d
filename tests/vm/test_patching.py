"""A shared kernel can be patched: probes and tracers work in one clone, and only there.

Not here: other writes of clones (test_sharing_clones.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from onecopy.guest.run_directory import GuestRecord
from onecopy.linux.counters import pagemap
from onecopy.model import MIB, PAGE_SIZE
from tests.vm import physical
from tests.vm.conftest import Clones, RunIn

PROBED = "do_sys_openat2"
TRACING = "/sys/kernel/tracing"
MOUNT = f"[ -e {TRACING}/trace ] || mount -t tracefs tracefs {TRACING}\n"
WHERE = f"""\
grep -E ' (_text|_etext|{PROBED})$' /proc/kallsyms
grep 'Kernel code' /proc/iomem
"""
KPROBE = f"""\
{MOUNT}
cd {TRACING}
echo p:probe_of_ours {PROBED} >>kprobe_events && echo 1 >events/kprobes/enable &&
cat /etc/hostname /etc/passwd >/dev/null 2>&1
grep -c 'probe_of_ours: ({PROBED}' trace
"""
TRACER = f"""\
{MOUNT}
cd {TRACING}
echo function >current_tracer
# Stopped at once: the tracer sees this script too, and its buffer is a ring.
read -r line </etc/passwd
echo 0 >tracing_on
cat current_tracer
grep -c '{PROBED} <-' trace
"""
STATE = f"""\
{MOUNT}
cd {TRACING}
cat current_tracer
# But for those by which our watcher learns that the guest ends.
grep -v ':onecopy/' kprobe_events
grep -vE '^kernel_(restart|restart_prepare|power_off|halt) ' enabled_functions
grep -vc '^#' trace
"""


@dataclass(frozen=True, slots=True)
class Text:
    """The guest's kernel text in its physical memory, in page numbers."""

    first: int
    end: int
    probed: int


def find_text(guest: GuestRecord, run_in: RunIn) -> Text:
    """Where the kernel is (kernel address randomisation: at boot, so the same in all clones)."""
    lines = run_in(guest, "sh", "-c", WHERE).stdout.decode().splitlines()
    symbols = {name: int(at, 16) for at, _, name in (line.split() for line in lines[:-1])}
    physical_start = int(lines[-1].split("-")[0], 16)

    def page(symbol: str) -> int:
        return (symbols[symbol] - symbols["_text"] + physical_start) // PAGE_SIZE

    return Text(page("_text"), page("_etext"), page(PROBED))


def content(guest: GuestRecord, text: Text) -> bytes:
    size = (text.end - text.first) * PAGE_SIZE
    return physical.ram_bytes(guest, text.first * PAGE_SIZE, size)


def own_pages(entries: list[int]) -> int:
    return sum(physical.private(entry) for entry in entries)


def check_patched(
    clones: Clones, run_in: RunIn, script: str, name: str, limit: int
) -> tuple[GuestRecord, GuestRecord, list[str]]:
    """Run ``script`` in one of two clones; check its kernel's text, the other's, and the cost.

    ``limit`` (bytes) is what it may cost at most. Returns both clones, and what was printed.
    """
    patched, other = clones(2)
    text = find_text(patched, run_in)
    assert find_text(other, run_in) == text
    # Both have run what the script runs, so that the difference is the patching.
    for guest in (patched, other):
        assert run_in(guest, "sh", "-c", STATE).exit_code in (0, 1)
        assert run_in(guest, "cat", "/etc/passwd").exit_code == 0
    before, others = physical.ram(patched), physical.ram(other)
    clean = content(patched, text)
    assert content(other, text) == clean
    assert own_pages(before[text.first : text.end]) == 0
    assert pagemap.pfn(before[text.probed]) == pagemap.pfn(others[text.probed]) is not None

    done = run_in(patched, "sh", "-c", script, timeout=400)
    assert done.exit_code == 0, done.stderr
    after, others_after = physical.ram(patched), physical.ram(other)
    patched_text = own_pages(after[text.first : text.end])
    cost = (own_pages(after) - own_pages(before)) * PAGE_SIZE
    print(
        f"{name}: {own_pages(before)} private pages before, {own_pages(after)} after "
        f"(+{cost / MIB:.1f} MiB), {patched_text} of them of the {text.end - text.first} of the "
        f"kernel's text; the other clone: {own_pages(others)} before, "
        f"{own_pages(others_after)} after"
    )

    # Patched here: the function's page is another one now, a copy of this clone's own.
    assert physical.private(after[text.probed])
    assert content(patched, text) != clean
    assert changed(clean, content(patched, text)) <= patched_text <= text.end - text.first
    assert cost < limit
    # Untouched there: the very page it was, and every byte of the text.
    assert pagemap.pfn(others_after[text.probed]) == pagemap.pfn(before[text.probed])
    assert own_pages(others_after[text.first : text.end]) == 0
    assert content(other, text) == clean
    return patched, other, done.stdout.decode().split()


def changed(before: bytes, after: bytes) -> int:
    """How many pages differ."""
    starts = range(0, len(before), PAGE_SIZE)
    return sum(before[at : at + PAGE_SIZE] != after[at : at + PAGE_SIZE] for at in starts)


def test_a_kprobe_in_one_clone(clones: Clones, run_in: RunIn) -> None:
    patched, other, (hits,) = check_patched(clones, run_in, KPROBE, "kprobe", 8 * MIB)
    assert int(hits) > 0
    here, there = (run_in(g, "sh", "-c", STATE).stdout.decode() for g in (patched, other))
    assert "probe_of_ours" in here
    assert there.split() == ["nop", "0"]


def test_the_function_tracer_in_one_clone(clones: Clones, run_in: RunIn) -> None:
    # Every function is patched: nearly all of the text, and a trace buffer.
    patched, other, told = check_patched(clones, run_in, TRACER, "function tracer", 48 * MIB)
    assert told[0] == "function"
    assert int(told[1]) > 0
    here, there = (run_in(g, "sh", "-c", STATE, timeout=300).stdout for g in (patched, other))
    assert here.startswith(b"function\n")
    assert there.split() == [b"nop", b"0"]
