"""Guests load segments by name: `onecopy-segment` in guests, `onecopy serve` on the host."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import AlreadyExists, NotFound, OtherDomain, Restricted
from onecopy.guest.exec import Completed
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.linux import process
from onecopy.model import Reference
from onecopy.store import Access, Artifact
from tests.command import ONECOPY, onecopy
from tests.vm.conftest import Boot, Clones, RunIn
from tests.vm.segments import record

REFUSED = 100
SERVE = [ONECOPY, "serve"]


@pytest.fixture
def site(host: Runtime, tmp_path: Path) -> Artifact:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/page").write_text("a page\n")
    return build_segment(
        host.store, Reference("asked"), f"dir:{tmp_path}/site", BuildOptions(fs="ext2")
    )


@pytest.fixture
def served(host: Runtime) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(SERVE, stderr=subprocess.PIPE, text=True) as process_:
        try:
            assert process_.stderr and "serving the guests" in process_.stderr.readline()
            heard = threading.Thread(target=process_.stderr.read)
            heard.start()
            yield process_
            process_.terminate()
            assert process_.wait(30) == 130
            heard.join()
        finally:
            process_.kill()


def ask(run_in: RunIn, guest: GuestRecord, *words: str) -> Completed:
    return run_in(guest, "onecopy-segment", *words)


def test_load_use_unload(
    host: Runtime,
    clones: Clones,
    run_in: RunIn,
    site: Artifact,
    served: subprocess.Popen[str],
) -> None:
    guest, other = clones(2)
    listed = ask(run_in, guest, "list").stdout.decode()
    assert "asked:latest" in listed and "onecopy-tools" not in listed
    found = ask(run_in, guest, "find", "asked").stdout.decode()
    assert site.digest in found and "SR" in found
    done = ask(run_in, guest, "load", "asked", "/srv/asked")
    assert done.exit_code == 0, done.stderr
    assert run_in(guest, "cat", "/srv/asked/page").stdout == b"a page\n"
    (item,) = [i for i in record(host, guest).attached if i.name == "asked"]
    assert (item.state, item.mountpoint) == ("loaded", "/srv/asked")
    assert guest.name in host.store.users(site.digest)
    assert "/srv/asked" in ask(run_in, guest, "find", "asked:latest").stdout.decode()

    # A private copy, in another guest, to write to.
    assert ask(run_in, other, "load", "-x", "asked", "/srv/asked").exit_code == 0
    assert run_in(other, "sh", "-c", "echo mine >/srv/asked/page").exit_code == 0
    assert run_in(guest, "cat", "/srv/asked/page").stdout == b"a page\n"

    assert ask(run_in, guest, "unload", "asked").exit_code == 0
    assert run_in(guest, "cat", "/srv/asked/page").exit_code != 0
    (item,) = [i for i in record(host, guest).attached if i.name == "asked"]
    assert item.state == "detached"
    assert ask(run_in, guest, "load", "asked").exit_code == 0
    assert run_in(guest, "test", "-b", "/dev/onecopy/asked").exit_code == 0


def test_each_refusal_is_told_by_its_name(
    host: Runtime, clones: Clones, run_in: RunIn, site: Artifact, served: subprocess.Popen[str]
) -> None:
    (guest,) = clones(1)
    store = host.store
    store.tag(Reference("asked"), Reference("locked"))
    store.restrict("locked", lambda _: Access(restricted=True))
    store.tag(Reference("asked"), Reference("foreign"), domain="foreign")
    assert ask(run_in, guest, "load", "asked").exit_code == 0
    for name, error in (
        ("unknown", NotFound),
        ("locked", Restricted),
        ("foreign", OtherDomain),
        ("asked", AlreadyExists),
    ):
        done = ask(run_in, guest, "load", name)
        assert done.exit_code == REFUSED + error.exit_code, (name, done.stderr)
        assert f"onecopy-segment: {error.id}: ".encode() in done.stderr
    listed = ask(run_in, guest, "list").stdout
    assert b"locked" not in listed and b"foreign" not in listed
    for name in ("locked", "foreign"):
        store.remove(Reference(name))


def test_without_a_service(clones: Clones, run_in: RunIn) -> None:
    (guest,) = clones(1)
    done = ask(run_in, guest, "-t", "2", "list")
    assert done.exit_code == 17
    assert b"is `onecopy serve` running" in done.stderr


def test_one_request_at_a_time(clones: Clones, run_in: RunIn) -> None:
    (guest,) = clones(1)
    script = (
        "onecopy-segment list & sleep 1; onecopy-segment -t 1 list; code=$?; kill $!; exit $code"
    )
    done = run_in(guest, "sh", "-c", script)
    assert done.exit_code == 18
    assert b"onecopy-segment: port-in-use: " in done.stderr


def test_a_guest_that_asks_while_it_starts(
    boot: Boot, python_root: Artifact, run_in: RunIn, site: Artifact, served: subprocess.Popen[str]
) -> None:
    # Asked long before the guest is handed out, which takes the agent's first answer.
    guest = boot(python_root, command="onecopy-segment load asked /srv/asked && exec sleep 999")
    script = "until cat /srv/asked/page; do sleep 0.1; done 2>/dev/null"
    assert run_in(guest, "timeout", "60", "sh", "-c", script).stdout == b"a page\n"


def test_one_service_is_enough(host: Runtime, served: subprocess.Popen[str]) -> None:
    second = onecopy("serve", code=None)
    assert second.returncode == AlreadyExists.exit_code


def test_guests_that_flood_and_stall_harm_nobody(
    host: Runtime, clones: Clones, run_in: RunIn, site: Artifact, served: subprocess.Popen[str]
) -> None:
    rogue, staller, *others = clones(4)
    port = (
        "for p in /sys/class/virtio-ports/*; do "
        "grep -q org.onecopy.segment.0 $p/name && d=/dev/${p##*/}; done; "
    )
    flood = port + "cat /dev/urandom >$d"
    # Asks, and never reads an answer.
    stall = port + "while :; do echo 1 list; done >$d"
    for guest, script in ((rogue, flood), (staller, stall)):
        run_in(guest, "sh", "-c", f"(sh -c '{script}' </dev/null >/dev/null 2>&1 &)")
    for guest in others:
        done = ask(run_in, guest, "load", "asked", "/srv")
        assert done.exit_code == 0, done.stderr
        assert run_in(guest, "cat", "/srv/page").stdout == b"a page\n"
    # It looks at so much of a flood, and waits: most of a core is left to others.
    before, began = process.cpu_seconds(served.pid), time.monotonic()
    time.sleep(5)
    used = process.cpu_seconds(served.pid) - before
    assert used < (time.monotonic() - began) / 2
    assert served.poll() is None
    # The service heard both, too.
    assert run_in(rogue, "true").exit_code == 0


def test_a_guest_that_ends_while_it_asks(
    host: Runtime, clones: Clones, run_in: RunIn, site: Artifact, served: subprocess.Popen[str]
) -> None:
    first, second = clones(2)
    run_in(first, "sh", "-c", "(onecopy-segment load asked </dev/null >/dev/null 2>&1 &)")
    host.end(first)
    assert ask(run_in, second, "load", "asked").exit_code == 0
    assert served.poll() is None
