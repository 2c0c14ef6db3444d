"""Starts a program and measures its cost: runs in a guest, as `python3 -c`, for layout.py.

Arguments: the program's root directory, its argv and standard input as JSON, the number of starts,
and `traced` or nothing. Prints JSON: "faults" (minor page faults) and "seconds" of the first start.
With `traced`, for one start: "large", "refused" and "small", the DAX faults that mapped 2 MiB,
tried to, and mapped 4 KiB (tracepoints fs_dax); and "tables", the largest size of its page tables
in KiB.
It uses the standard library only.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TRACE = Path("/sys/kernel/tracing")


def start(
    folder: str, argv: Sequence[str], given: str, watch: Callable[[int], None] | None = None
) -> tuple[int, float]:
    """Run the program to its end; return its minor page faults and seconds."""

    def enter() -> None:
        os.chroot(folder)
        os.chdir("/")

    began = time.monotonic()
    program = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "HOME": "/"},
        preexec_fn=enter,
    )
    if watch:
        threading.Thread(target=watch, args=[program.pid]).start()
    if program.stdin:
        program.stdin.write(given.encode())
        program.stdin.close()
    _, status, used = os.wait4(program.pid, 0)
    seconds = time.monotonic() - began
    program.returncode = status
    if status:
        sys.exit(f"{argv[0]}: wait status {status:#x}")
    return used.ru_minflt, seconds


def traced(folder: str, argv: Sequence[str], given: str) -> dict[str, int]:
    """Count the DAX faults of a start, and measure the largest size of its page tables."""
    tables = [0]

    def watch(pid: int) -> None:
        while True:
            try:
                told = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return
            if "VmPTE:" not in told:
                return
            tables[0] = max(tables[0], int(told.split("VmPTE:")[1].split()[0]))
            time.sleep(0.01)

    (TRACE / "buffer_size_kb").write_text("16384")
    switches = [TRACE / f"events/fs_dax/dax_{kind}_fault_done/enable" for kind in ("pmd", "pte")]
    (TRACE / "trace").write_text("")
    for switch in switches:
        switch.write_text("1")
    start(folder, argv, given, watch)
    for switch in switches:
        switch.write_text("0")
    with (TRACE / "trace").open() as trace:
        lines = [line for line in trace if not line.startswith("#")]
    large = [line for line in lines if "dax_pmd_fault_done" in line]
    refused = sum("FALLBACK" in line for line in large)
    return {
        "large": len(large) - refused,
        "refused": refused,
        "small": len(lines) - len(large),
        "tables": tables[0],
    }


def main(folder: str, program: str, count: str, kind: str = "") -> None:
    """Run as the module's docstring describes."""
    argv, given = json.loads(program)
    if kind == "traced":
        print(json.dumps(traced(folder, argv, given)))
        return
    told = [start(folder, argv, given) for _ in range(int(count))]
    print(json.dumps({"faults": told[0][0], "seconds": told[0][1]} if told else {}))


main(*sys.argv[1:])
