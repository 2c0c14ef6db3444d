"""Runs a workload in a chroot on this host, in a booted guest, and in clones of that guest.

Each place runs the same shell commands in the same root, as root, with the same environment.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import onecopy
from onecopy.errors import OnecopyError
from onecopy.store import Artifact
from tests.workloads.tap import Lost

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
#: Where each place has the programs, and the segment that guests have them from.
MOUNTPOINT = "/srv/workloads"
SEGMENT = "workload-programs"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = ("-i", f"PATH={_PATH}", "HOME=/root", "TERM=dumb", "LANG=C.UTF-8", "TZ=UTC")


def in_guest(guest: onecopy.Guest, command: str, timeout: float) -> str:
    """Run a shell command in a guest and return what it printed.

    Raises Lost if it does not exit with 0, or the guest does not answer.
    """
    try:
        done = guest.exec(["env", *_ENVIRONMENT, "sh", "-c", command], check=False, timeout=timeout)
    except OnecopyError as error:
        raise Lost(f"{guest.name}: {error.message}\n{_console(guest)}") from error
    return _output(guest.name, done.exit_code, done.stdout, done.stderr)


def in_chroot(root: Artifact, command: str, timeout: float) -> str:
    """Run a shell command in a root segment on this host's kernel; as `in_guest`."""
    environment = {"PATH": os.environ["PATH"], "PROGRAMS": str(PROGRAMS)}
    environment["IMAGE"] = str(root.layer("image").path)
    argv = [str(HERE / "chroot"), "env", *_ENVIRONMENT, "sh", "-c", command]
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise Lost(f"chroot: no end within {timeout:g} s") from error
    return _output("chroot", done.returncode, done.stdout, done.stderr)


def _output(place: str, code: int, out: bytes, err: bytes) -> str:
    said = err.decode(errors="replace")
    if code:
        told = out.decode(errors="replace")
        raise Lost(f"{place}: exit code {code}\n{told[-2000:]}\n{said[-6000:]}")
    # What failed tests said comes as comments.
    return out.decode(errors="replace") + "".join(f"## {line}\n" for line in said.splitlines())


def _console(guest: onecopy.Guest) -> str:
    try:
        return guest.log()[-3000:]
    except OnecopyError:
        return "its log is gone"
