"""Fixtures of the tests with real guests: a store with roots and systems, and guests that end.

Each session works in its own copy of a kept store (kept.py). Not here: examining a guest's memory
(physical.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from onecopy.errors import BadSource, MissingProgram
from onecopy.guest.exec import Completed
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.images.kernel import ensure_kernel
from onecopy.model import Reference
from onecopy.store import Artifact
from onecopy.vmm import fork_registry
from onecopy.vmm.accel import Choice, choose
from onecopy.vmm.closed_network import TABLE, is_closed
from onecopy.vmm.vmm_user import User
from tests.conftest import cannot_run
from tests.vm.guests import Guests, open_guests, save_system
from tests.vm.kept import (
    PYTHON_ROOT,
    SERVICES,
    SYSTEMD_ROOT,
    kept_root,
    kept_store,
    kept_system,
)

#: What guests must run under ("kvm" or "tcg"); else what is found.
ACCEL = os.environ.get("ONECOPY_TEST_ACCEL")
#: Where there is no KVM script/test-kvm makes one, and runs these.
collect_ignore = [] if ACCEL == "kvm" else ["kvm"]

APP = """\
import http.server, socket

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (socket.gethostname() + "\\n").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("", 80), Handler).serve_forever(poll_interval=86400)
"""
PROBE = """\
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
/* With no argument stays up; else prints its arguments after the first, which is its exit code. */
int main(int argc, char **argv) {
    if (argc < 2)
        for (;;) pause();
    for (int i = 2; i < argc; i++) puts(argv[i]);
    return atoi(argv[1]);
}
"""

Clones = Callable[[int], list[GuestRecord]]


class RunIn(Protocol):
    """The fixture ``run_in``: run a program in a guest, ``timeout`` in seconds."""

    def __call__(
        self, guest: GuestRecord, *argv: str, stdin: bytes | None = None, timeout: float = 120
    ) -> Completed: ...


class Boot(Protocol):
    """The fixture ``boot``: boot one guest from a segment; ``options`` are `Host.boot`'s."""

    def __call__(self, root: Artifact, **options: object) -> GuestRecord: ...


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A store of the session's own, also for subprocesses; at the end no VMM of it is left."""
    if os.geteuid() != 0:
        cannot_run("Debian roots are built, and physical pages seen, by root only")
    root = tmp_path_factory.mktemp("home") / "store"
    with _or_cannot_run(), kept_store() as kept:
        kept.copy(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECOPY_HOME", str(root))
        mine = Runtime.open(root)
        _require_accelerator(mine)
        try:
            yield mine
        finally:
            mine.sweep()
            for record in mine.guests():
                mine.end(record)
            left = vmms(mine)
            fork_registry.end(mine.run.name)
            shutil.rmtree(mine.run)
            shutil.rmtree(root)
            remove_rules()
        assert not left, f"VMMs were left: {left}"


def _require_accelerator(host: Runtime) -> None:
    if ACCEL:
        kernel = ensure_kernel(host.store).layer("kernel").path
        found = choose(Choice.AUTO, host.qemu.binary, kernel, host.store.cache)
        assert found.name == ACCEL, f"guests would run under {found.name}: {found.reason}"


def vmms(host: Runtime) -> list[int]:
    """Process ids of all VMMs with a run folder of ``host``, whether on record or not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                where = (entry / "cwd").readlink()
            except OSError:  # it ended meanwhile
                continue
            ours = where.is_relative_to(host.run)
            if line.partition(b"\0")[0].endswith(b"qemu-system-x86_64") and ours:
                found.append(int(entry.name))
    return found


def left(host: Runtime) -> dict[str, list[str]]:
    """What a guest or command leaves: VMMs, leases, run folders, workspaces."""
    return {
        "vmms": [str(pid) for pid in vmms(host)],
        "leases": [record.holder for record in host.store.leases()],
        "folders": sorted(path.name for path in host.run.iterdir() if path.is_dir()),
        "workspaces": [path.name for path in (host.store.root / "tmp").iterdir()],
    }


def remove_rules() -> None:
    """Remove the rules that close guests, unless somebody else has some."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    if not any(is_closed(User.of(pid)) for pid in pids):
        subprocess.run(["nft", "delete", "table", "inet", TABLE], capture_output=True)


@contextmanager
def _or_cannot_run() -> Iterator[None]:
    """Say so if the kept store cannot be filled here."""
    try:
        yield
    except (BadSource, MissingProgram) as error:
        cannot_run(error.message)


def _root(host: Runtime, ref: Reference) -> Artifact:
    with _or_cannot_run():
        return kept_root(host, ref)


@pytest.fixture(scope="session")
def python_root(host: Runtime) -> Artifact:
    """Root segment: Debian with python3, no init."""
    return _root(host, PYTHON_ROOT)


@pytest.fixture(scope="session")
def app(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Segment with app.py: an HTTP server on port 80 that answers its hostname."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "app.py").write_text(APP)
    return build_segment(host.store, Reference("app"), f"dir:{folder}")


@pytest.fixture(scope="session")
def busybox_root(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Root segment: /bin/busybox and /bin/sh, nothing else."""
    folder = tmp_path_factory.mktemp("busybox")
    (folder / "bin").mkdir()
    shutil.copy("/bin/busybox", folder / "bin/busybox")
    (folder / "bin/sh").symlink_to("busybox")
    return build_segment(host.store, Reference("busybox"), f"dir:{folder}")


@pytest.fixture(scope="session")
def busybox_init_root(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Root segment: busybox with its init."""
    folder = tmp_path_factory.mktemp("init")
    for path in ("bin", "sbin", "etc"):
        (folder / path).mkdir()
    (folder / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (folder / "bin/busybox").chmod(0o755)
    (folder / "bin/sh").symlink_to("busybox")
    (folder / "sbin/init").symlink_to("../bin/busybox")
    (folder / "etc/inittab").write_text("::sysinit:/bin/busybox true\n")
    return build_segment(host.store, Reference("busybox-init"), f"dir:{folder}")


@pytest.fixture(scope="session")
def static_root(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Root segment: one static program, /bin/probe (see PROBE), and no shell."""
    if shutil.which("gcc") is None:
        cannot_run("there is no gcc")
    folder = tmp_path_factory.mktemp("static")
    (folder / "bin").mkdir()
    source = folder.with_suffix(".c")
    source.write_text(PROBE)
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", folder / "bin/probe", source], check=True)
    return build_segment(host.store, Reference("static"), f"dir:{folder}")


@pytest.fixture(scope="session")
def systemd_root(host: Runtime) -> Artifact:
    """Root segment: Debian with systemd as its init."""
    return _root(host, SYSTEMD_ROOT)


@pytest.fixture(scope="session")
def services_root(host: Runtime) -> Artifact:
    """Root segment: Debian 13 with systemd, an SSH server and cron."""
    return _root(host, SERVICES)


@pytest.fixture(scope="session")
def systemd_system(host: Runtime, systemd_root: Artifact) -> Artifact:
    """Saved system: Debian with systemd, up."""
    return kept_system(
        host,
        "systemd-saved",
        lambda: save_system("systemd-saved", systemd_root, memory="256M"),
    )


@pytest.fixture(scope="session")
def saved(host: Runtime, python_root: Artifact, app: Artifact) -> Artifact:
    """Saved system: ``python_root`` with the app at /srv/app answering on port 80."""

    def make() -> Artifact:
        return save_system(
            "saved",
            python_root,
            segments=[f"{app.ref}:/srv/app"],
            memory="256M",
            command="exec python3 /srv/app/app.py",
            ready="wget -q -O /dev/null http://127.0.0.1/",
        )

    return kept_system(host, "saved", make)


@pytest.fixture(scope="session")
def minimal(host: Runtime, busybox_root: Artifact) -> Artifact:
    """Saved system: ``busybox_root`` under our minimal init, and nothing else."""

    def make() -> Artifact:
        return save_system("minimal", busybox_root, memory="128M", command="")

    return kept_system(host, "minimal", make)


@pytest.fixture
def guests(host: Runtime) -> Iterator[Guests]:
    """Boot and clone guests through `onecopy.Host` (guests.py); they end after the test."""
    with open_guests() as mine:
        yield mine


@pytest.fixture
def clones(guests: Guests, saved: Artifact) -> Clones:
    """``clones(n)`` starts n clones of ``saved``, for tests of what the host has on record."""
    return lambda count: [guest.record for guest in guests.clone(saved, count)]


@pytest.fixture
def boot(guests: Guests) -> Boot:
    """``boot(root, **options)`` boots a guest, for tests of what the host has on record."""
    return lambda root, **options: guests.boot(root, **options).record


@pytest.fixture
def run_in(guests: Guests) -> RunIn:
    """``run_in(guest, *argv)`` runs a program in a guest and returns what came of it."""

    def run(
        guest: GuestRecord, *argv: str, stdin: bytes | None = None, timeout: float = 120
    ) -> Completed:
        found = guests.host.guest(guest.name)
        return found.exec(argv, check=False, stdin=stdin, timeout=timeout)

    return run
