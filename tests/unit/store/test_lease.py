"""Leases, with real processes that inherit them and die."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onecopy.errors import AlreadyExists, InUse, InvalidInput, NotFound, StoreDamaged
from onecopy.model import Reference
from onecopy.store import Lease, Store
from tests.unit.store_kit import blobs, check_whole, digest_of, fork, put

APP = Reference.parse("app:1")


@contextmanager
def guest(lease: Lease) -> Iterator[subprocess.Popen[bytes]]:
    """A process that inherits ``lease``, as QEMU does; our own copy is closed."""
    process = subprocess.Popen(["/bin/sleep", "1000"], pass_fds=[lease.fd])
    lease.close()
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_guest_holds_its_lease_until_it_is_killed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    with guest(store.hold([artifact.digest], "web-1", {"system": "app:1"})) as process:
        assert store.users(artifact.digest) == ["web-1"]
        assert store.users(artifact.layers[0].digest) == ["web-1"]
        assert store.is_held("web-1")
        assert [record.info for record in Store(tmp_path).leases()] == [{"system": "app:1"}]
        with pytest.raises(InUse) as refused:
            store.remove(APP)
        assert refused.value.users == ("web-1",)
        assert store.resolve(APP) == artifact
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert store.users(artifact.digest) == []
    assert not store.is_held("web-1")
    Store(tmp_path)
    assert list((tmp_path / "leases").iterdir()) == []
    assert store.remove(APP) == artifact
    assert check_whole(tmp_path) == {}


def test_a_holder_gets_another_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    lease = store.hold([artifact.digest], "pool.1")
    (lease.files / "mark").touch()
    with guest(lease), guest(store.hold([artifact.digest], "web-1")):
        with pytest.raises(AlreadyExists):
            store.rename_holder("pool.1", "web-1")
        store.rename_holder("pool.1", "web-2")
        Store(tmp_path)
        assert store.users(artifact.digest) == ["web-1", "web-2"]
        assert store.is_held("web-2")
        assert not store.is_held("pool.1")
        assert (tmp_path / "leases/web-2.files/mark").exists()
        with store.extend("web-2", [artifact.digest]):
            assert store.held("web-2") == [artifact, artifact]
    Store(tmp_path)
    assert list((tmp_path / "leases").iterdir()) == []


def test_a_lease_without_a_guest_ends_with_its_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)

    def hold_and_die() -> None:
        store.hold([artifact.digest], "web-1")
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(hold_and_die), 0)
    assert (tmp_path / "leases" / "web-1.json").exists()
    assert store.users(artifact.digest) == []
    # The same name again: the dead one is no obstacle.
    with store.hold([artifact.digest], "web-1"):
        assert store.users(artifact.digest) == ["web-1"]


def test_one_holder_one_lease(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    with store.hold([artifact.digest], "web-1"):
        with pytest.raises(AlreadyExists):
            Store(tmp_path).hold([artifact.digest], "web-1")
        with store.hold([artifact.digest], "web-2"):
            assert store.users(artifact.digest) == ["web-1", "web-2"]
    assert store.users(artifact.digest) == []


def test_close_twice_closes_nothing_of_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lease = store.hold([put(store).digest], "web-1")
    lease.close()
    with (tmp_path / "other").open("w") as other:
        os.dup2(other.fileno(), lease.fd)
        lease.close()
        assert os.fstat(lease.fd).st_ino == os.fstat(other.fileno()).st_ino
        os.close(lease.fd)


def test_the_guest_cannot_write_to_its_lease(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.hold([put(store).digest], "web-1") as lease, pytest.raises(OSError, match="Bad"):
        os.write(lease.fd, b"x")


def test_replaced_while_leased_stays_then_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = put(store, content=b"old")
    with guest(store.hold([old.digest], "web-1")):
        new = put(store, content=b"new")
        pending = {old.digest, digest_of(b"old")}
        assert store.collect() == []
        assert check_whole(tmp_path, pending) == {"app:1": new.digest}
        # A new guest gets the new one; the old one has no name any more.
        assert store.resolve(APP) == new
        with pytest.raises(NotFound):
            store.hold([old.digest], "web-2")
    Store(tmp_path)
    assert check_whole(tmp_path) == {"app:1": new.digest}


def test_pending_purge_survives_the_holders_name_being_used_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.hold([put(store, content=b"old").digest], "web-1").close()
    # The lease is stale here, so replacing collects the old blob at once.
    new = put(store, content=b"new")
    assert check_whole(tmp_path) == {"app:1": new.digest}
    lease = store.hold([new.digest], "web-1")
    newest = put(store, content=b"newest")
    assert digest_of(b"new") in blobs(tmp_path)
    lease.close()
    with store.hold([newest.digest], "web-1"):
        assert check_whole(tmp_path) == {"app:1": newest.digest}


def test_another_name_of_a_leased_artifact_can_go(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store, "app:1")
    put(store, "app:2")
    with store.hold([artifact.digest], "web-1"):
        store.remove(Reference.parse("app:2"))
        with pytest.raises(InUse):
            store.remove(APP)


def test_a_removed_segment_stays_while_a_saved_system_needs_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    segment = put(store, "root:1", b"root")
    system = put(store, "sys:1", b"ram", kind="system", reuse=[segment.layers[0].digest])
    store.remove(Reference.parse("root:1"))
    assert check_whole(tmp_path) == {"sys:1": system.digest}
    with store.hold([system.digest], "web-1"):
        assert store.users(segment.layers[0].digest) == ["web-1"]


def test_what_cannot_be_held(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    with pytest.raises(InvalidInput):
        store.hold([artifact.digest], "../index")
    with pytest.raises(NotFound):
        store.hold([digest_of(b"nothing")], "web-1")
    artifact.layers[0].path.unlink()
    with pytest.raises(StoreDamaged):
        store.hold([artifact.digest], "web-1")
    assert list((tmp_path / "leases").iterdir()) == []


def test_a_damaged_lease_of_a_live_guest_stops_collection(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    with store.hold([artifact.digest], "web-1") as lease:
        lease.path.chmod(0o644)
        lease.path.write_bytes(b"{")
        before = blobs(tmp_path)
        with pytest.raises(StoreDamaged, match=r"web-1\.json"):
            store.collect()
        assert blobs(tmp_path) == before
    Store(tmp_path)
    assert list((tmp_path / "leases").iterdir()) == []


def test_testers_never_look_like_holders(tmp_path: Path) -> None:
    """Many threads test one stale lease at once: none may see another's test as a hold."""
    store = Store(tmp_path)
    store.hold([put(store).digest], "web-1").close()
    seen: list[bool] = []
    threads = [
        threading.Thread(target=lambda: seen.extend(store.is_held("web-1") for _ in range(2000)))
        for _ in range(4)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(seen) == 8000
    assert not any(seen)
