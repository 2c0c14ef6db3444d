"""What the tests with real guests share: a store with things to boot, and guests that end.

Each session works in a store of its own, a copy of a kept one (kept.py). Not here: what is looked
at in a guest's memory (physical.py).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from onecopy.errors import BadSource, MissingProgram
from onecopy.guest.exec import Completed, run_captured
from onecopy.guest.exec_streams import KEPT
from onecopy.guest.lifecycle.batch import names_for, start_many
from onecopy.guest.lifecycle.boot import boot_guest
from onecopy.guest.lifecycle.bootplan import BootSpec, plan_boot
from onecopy.guest.lifecycle.restore import start_clone, template
from onecopy.guest.lifecycle.save import save_system
from onecopy.guest.run_directory import Batch, GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.images.kernel import ensure_kernel
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from onecopy.vmm.accel import Choice, choose
from onecopy.vmm.closed_network import TABLE, is_closed
from onecopy.vmm.vmm_user import User
from tests.conftest import cannot_run
from tests.vm.kept import SUITE, kept_store

PYTHON_ROOT = Reference("python", SUITE)
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


class Cold(Protocol):
    """The fixture ``cold``: boot one guest from a segment; ``options`` are BootSpec's."""

    def __call__(self, root: Artifact, **options: object) -> GuestRecord: ...


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A store of the session's own, also for subprocesses; at the end no VMM of it is left."""
    if os.geteuid() != 0:
        cannot_run("Debian roots are built, and physical pages seen, by root only")
    root = tmp_path_factory.mktemp("home") / "store"
    _copy_kept_store(root)
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


def remove_rules() -> None:
    """Remove the rules that close guests, unless somebody else has some."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    if not any(is_closed(User.of(pid)) for pid in pids):
        subprocess.run(["nft", "delete", "table", "inet", TABLE], capture_output=True)


def _copy_kept_store(root: Path) -> None:
    try:
        with kept_store() as kept:
            # Copied, not linked: a test may damage what it has.
            subprocess.run(["cp", "-a", "--reflink=auto", kept.store.root, root], check=True)
    except (BadSource, MissingProgram) as error:
        cannot_run(error.message)


@pytest.fixture(scope="session")
def python_root(host: Runtime) -> Artifact:
    """Root segment: Debian with python3, no init."""
    return host.store.resolve(PYTHON_ROOT, "segment")


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
    return host.store.resolve(Reference("systemd", SUITE), "segment")


@pytest.fixture(scope="session")
def systemd_system(host: Runtime, systemd_root: Artifact) -> Artifact:
    """Saved system: Debian with systemd, up."""
    spec = BootSpec(root=Reference.parse(systemd_root.ref), memory=256 * MIB)
    return asyncio.run(save_system(host, Reference("systemd-saved"), spec)).artifact


@pytest.fixture(scope="session")
def saved(host: Runtime, python_root: Artifact, app: Artifact) -> Artifact:
    """Saved system: ``python_root`` with the app at /srv/app answering on port 80."""
    spec = BootSpec(
        root=Reference.parse(python_root.ref),
        segments=((Reference.parse(app.ref), "/srv/app"),),
        memory=256 * MIB,
        command="exec python3 /srv/app/app.py",
        ready="wget -q -O /dev/null http://127.0.0.1/",
    )
    return asyncio.run(save_system(host, Reference("saved"), spec)).artifact


@pytest.fixture
def clones(host: Runtime, saved: Artifact) -> Iterator[Clones]:
    """``clones(n)`` starts n clones of ``saved``; they end after the test."""
    source = template(host, saved)
    started: list[GuestRecord] = []

    def start(count: int) -> list[GuestRecord]:
        names = names_for("clone", None, count)
        new = _start(host, names, lambda name, batch: start_clone(host, source, name, batch=batch))
        started.extend(new)
        return new

    yield start
    for record in started:
        host.end(record)
    # Those that a test let end by themselves.
    host.forget(*(record.name for record in started))


@pytest.fixture
def cold(host: Runtime) -> Iterator[Cold]:
    """``cold(root, **options)`` boots a guest from a segment; it ends after the test."""
    started: list[GuestRecord] = []

    def boot(root: Artifact, **options: object) -> GuestRecord:
        options = {"idle": True, **options}
        spec = BootSpec(root=Reference.parse(root.ref), **options)  # type: ignore[arg-type]
        prepared = plan_boot(host, spec)
        names = names_for("cold", None, 1)
        started.extend(
            _start(host, names, lambda name, batch: boot_guest(host, prepared, name, batch))
        )
        return started[-1]

    yield boot
    for record in started:
        host.end(record)
    # Those that a test let end by themselves.
    host.forget(*(record.name for record in started))


def _start(
    host: Runtime, names: list[str], start: Callable[[str, Batch], Awaitable[GuestRecord]]
) -> list[GuestRecord]:
    return list(asyncio.run(start_many(host, names, start)).guests)


@pytest.fixture
def run_in(host: Runtime) -> RunIn:
    """``run_in(guest, *argv)`` runs a program in a guest and returns what came of it."""

    def run(
        guest: GuestRecord, *argv: str, stdin: bytes | None = None, timeout: float = 120
    ) -> Completed:
        folder = host.run / guest.name
        running = run_captured(folder, argv, stdin=stdin, timeout=timeout, limit=KEPT)
        return asyncio.run(running)

    return run
