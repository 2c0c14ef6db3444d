"""Record what this host's kernel tells of two QEMUs, for the unit tests: record.py FOLDER, as root.

The files below FOLDER/VERSION are the kernel's, byte for byte. 1001 is a QEMU with 256 MiB of
anonymous RAM, 1002 one with RAM mapped copy-on-write from a file and a segment; both are stopped
while they are read, and neither runs its guest.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

FILES = Path("/tmp/onecopy-rec")
QEMU = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-accel", "tcg,tb-size=32"]
BACKEND = "memory-backend-file"
GUESTS = {
    1001: [*QEMU, "-M", "q35", "-m", "256M"],
    1002: [
        *QEMU,
        *("-M", "q35,memory-backend=ram", "-m", "256M,slots=1,maxmem=1G"),
        *("-object", f"{BACKEND},id=ram,size=256M,mem-path={FILES}/ram,share=off"),
        *("-object", f"{BACKEND},id=segment,size=4M,mem-path={FILES}/segment,share=on"),
        *("-device", "virtio-pmem-pci,memdev=segment"),
    ],
}
OF_PROCESS = ("cmdline", "ksm_merging_pages", "ksm_stat", "smaps", "smaps_rollup", "stat", "status")
OF_HOST = ("proc/meminfo", "proc/zoneinfo", "sys/kernel/mm/ksm")


def main() -> None:
    out = Path(sys.argv[1]) / platform.release()
    FILES.mkdir()
    for name, size in (("ram", 256 << 20), ("segment", 4 << 20)):
        (FILES / name).write_bytes(b"")
        os.truncate(FILES / name, size)
    for name in OF_HOST:
        copy(Path("/") / name, out / name)
    processes = {pid: subprocess.Popen(argv) for pid, argv in GUESTS.items()}
    try:
        for pid, process in processes.items():
            while b" 262144 kB" not in Path(f"/proc/{process.pid}/smaps").read_bytes():
                time.sleep(1)
            # Its devices, too.
            time.sleep(5)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            for name in OF_PROCESS:
                copy(Path("/proc") / str(process.pid) / name, out / "proc" / str(pid) / name)
    finally:
        for process in processes.values():
            process.kill()
    for name in ("ram", "segment"):
        (FILES / name).unlink()
    FILES.rmdir()


def copy(source: Path, target: Path) -> None:
    """A file or a folder of files; what this kernel has not is not there."""
    if source.is_dir():
        for path in source.iterdir():
            copy(path, target / path.name)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


main()
