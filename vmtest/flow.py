"""Runs in a host: the everyday way through onecopy, as one user, for guests of one suite.

From a kept segment over a saved system to two clones that answer with their own names, by the
command line alone. What came of it is a Row (support.py), written to standard output as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onecopy.vmm.qemu import BINARY
from tests.vm.conftest import APP
from vmtest.support import Row

#: Seconds that one command may take: in an emulated host that is much longer than elsewhere.
PATIENCE = 1500
#: Exit codes that mean "not here", and not "broken" (docs/exit-codes.md).
REFUSALS = (13, 15)


#: Under vmtest/chroot a user can make no namespaces (unshare(2)), which closing their guests takes.
OPEN = () if os.geteuid() == 0 else ("--allow-host",)


class Refused(Exception):
    """onecopy said that this cannot be done here, and why."""


class Failed(Exception):
    """It went wrong."""


def onecopy(*argv: str) -> str:
    """What a command prints; raise Refused or Failed with what it said."""
    program = Path(sys.executable).with_name("onecopy")
    try:
        done = subprocess.run([program, *argv], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"onecopy {argv[0]} took more than {PATIENCE} s") from None
    if done.returncode:
        said = " ".join(line.removeprefix("onecopy: ") for line in done.stderr.splitlines()[-3:])
        problem = Refused if done.returncode in REFUSALS else Failed
        raise problem(f"onecopy {argv[0]}: {said or done.returncode}")
    return done.stdout


def _expect(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise Failed(f"{what}: {found!r} in place of {wanted!r}")


def _answer(port: int) -> str:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as reply:
                return str(reply.read().decode().strip())
        except OSError as error:
            if time.monotonic() > deadline:
                raise Failed(f"no answer on port {port}: {error}") from None
            time.sleep(1)


def save_web(suite: str, accel: str, work: Path) -> None:
    """Build a segment and save the system ``web`` with it; raise Refused or Failed."""
    site = work / "site"
    site.mkdir()
    (site / "app.py").write_text(APP)
    onecopy("build", "site", "--from", f"dir:{site}")
    ready = ["--ready", "wget -q -O /dev/null http://127.0.0.1/", "--timeout", str(PATIENCE)]
    save = ["save", "web", "--root", f"python:{suite}", "--segment", "site:/srv"]
    onecopy(*save, "--command", "exec python3 /srv/app.py", *ready, "--accel", accel, *OPEN)


def use_web(suite: str, accel: str) -> None:
    """Run two clones of ``web``, ask, exec, report, stop; raise Refused or Failed."""
    try:
        run = ["run", "-n", "2", "-p", "0:80", "--json", *OPEN, "web"]
        started = json.loads(onecopy(*run))["guests"]
        for guest in started:
            _expect("accelerator", guest["accel"], accel)
            _expect("answer", _answer(guest["publish"][0][0]), guest["name"])
        release = onecopy("exec", started[0]["name"], "--", "cat", "/etc/os-release")
        _expect("the guest's release", f"VERSION_CODENAME={suite}" in release, True)
        report = json.loads(onecopy("report", "--json"))
        _expect("guests in the report", len(report["guests"]), 2)
    finally:
        onecopy("stop", "--all")


def flow(suite: str, accel: str, work: Path) -> None:
    """Build, save, run, ask, exec, report, stop, remove; raise Refused or Failed."""
    save_web(suite, accel, work)
    use_web(suite, accel)
    onecopy("rm", "web")


def tell_row(work: Callable[[], None], guest: str, accel: str, saved_by: str = "") -> None:
    """Do ``work`` and print what came of it, as JSON."""
    result, reason = "works", ""
    began = time.monotonic()
    try:
        work()
    except Refused as error:
        result, reason = "refused", str(error)
    except Failed as error:
        result, reason = "failed", str(error)
    version = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True)
    row = Row(
        host=f"Debian {platform.freedesktop_os_release()['VERSION_ID']}",
        guest=guest,
        qemu=version.stdout.split()[3].partition("(")[0],
        accel=accel,
        user="root" if os.geteuid() == 0 else "user",
        result=result,
        reason=reason,
        seconds=round(time.monotonic() - began),
        saved_by=saved_by,
    )
    print(json.dumps(asdict(row)))


def main() -> None:
    """flow SUITE ACCEL FOLDER."""
    suite, accel, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    tell_row(lambda: flow(suite, accel, work), suite, accel)


if __name__ == "__main__":
    main()
