"""Replaced or removed in use: pending purge; and the further leases of running guests."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from onecopy.errors import InUse, NotFound, StoreDamaged
from onecopy.guest.observe.inspect import describe
from onecopy.model import Reference
from onecopy.store import Store
from tests.unit.store_kit import check_whole, digest_of, fork, put

APP = Reference.parse("app:1")


def leases(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "leases").iterdir())


def test_three_versions_at_once_and_each_goes_with_its_last_user(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = put(store, content=b"one")
    first = store.hold([one.digest], "web-1")
    two = put(store, content=b"two")
    second, third = store.hold([two.digest], "web-2"), store.hold([two.digest], "web-3")
    three = put(store, content=b"three")
    pending = store.pending()
    assert {each.digest for each in pending} == {one.digest, two.digest}
    assert {each.ref for each in pending} == {"app:1"}
    assert store.artifacts() == [three]
    assert {each.digest: store.users(each.digest) for each in pending} == {
        one.digest: ["web-1"],
        two.digest: ["web-2", "web-3"],
    }
    second.close()
    assert len(Store(tmp_path).pending()) == 2
    third.close()
    assert [each.digest for each in Store(tmp_path).pending()] == [one.digest]
    assert digest_of(b"two") not in {path.name for path in (tmp_path / "blobs/sha256").iterdir()}
    first.close()
    assert Store(tmp_path).pending() == []
    assert check_whole(tmp_path) == {"app:1": three.digest}


def test_it_is_found_by_its_digest_and_described(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = put(store, content=b"old")
    with store.hold([old.digest], "web-1"):
        new = put(store, content=b"new")
        found = store.resolve(Reference("app", digest=old.digest))
        assert (found.digest, found.kind, found.ref) == (old.digest, "segment", "app:1")
        assert found.layers == old.layers
        store.verify(found)
        with pytest.raises(NotFound, match="is a segment, not a system"):
            store.resolve(Reference("app", digest=old.digest), "system")
        with pytest.raises(NotFound):
            store.resolve(Reference("other", digest=old.digest))
        told = describe(store, found, pending=True)
        assert (told["state"], told["users"], told["created"]) == ("P", ["web-1"], None)
        told = describe(store, new)
        assert (told["state"], told["users"]) == ("A", [])
    Store(tmp_path)
    with pytest.raises(NotFound):
        store.resolve(Reference("app", digest=old.digest))


def test_rm_in_use_is_refused_unless_it_may_be_pending(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    with store.hold([artifact.digest], "web-1"):
        with pytest.raises(InUse, match="web-1") as refused:
            store.remove(APP)
        assert "--pending" in refused.value.hint
        assert store.remove(APP, in_use=True) == artifact
        assert store.artifacts() == []
        assert [each.digest for each in store.pending()] == [artifact.digest]
        # The same again is no longer pending.
        assert put(store).digest == artifact.digest
        assert store.pending() == []
        store.remove(APP, in_use=True)
    Store(tmp_path)
    assert check_whole(tmp_path) == {}


def test_a_name_taken_by_another_digest_is_not_the_pending_one_s(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store, "app:1")
    put(store, "other:1")
    with store.hold([artifact.digest], "web-1"):
        store.remove(APP)
        # It has a name still.
        assert store.pending() == []


def test_a_further_lease(tmp_path: Path) -> None:
    store = Store(tmp_path)
    root, data = put(store, "root:1", b"root"), put(store, "data:1", b"data")
    with pytest.raises(NotFound, match="web-1"):
        store.extend("web-1", [data.digest])
    main = store.hold([root.digest], "web-1")
    further = store.extend("web-1", [data.digest])
    again = store.extend("web-1", [data.digest])
    assert len({main.path, further.path, again.path}) == 3
    assert store.users(data.digest) == store.users(root.digest) == ["web-1"]
    assert store.is_held("web-1")
    with pytest.raises(InUse):
        store.remove(Reference.parse("data:1"))
    further.close()
    assert Store(tmp_path).users(data.digest) == ["web-1"]
    again.close()
    assert Store(tmp_path).users(data.digest) == []
    assert leases(tmp_path) == ["web-1.files", "web-1.json"]
    main.close()
    assert not Store(tmp_path).is_held("web-1")
    assert leases(tmp_path) == []


def test_a_further_lease_alone_is_no_guest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    main = store.hold([artifact.digest], "web-1")
    with store.extend("web-1", [artifact.digest]):
        main.close()
        assert not store.is_held("web-1")
        assert store.users(artifact.digest) == ["web-1"]
        Store(tmp_path)
        with pytest.raises(NotFound):
            store.extend("web-1", [artifact.digest])
        # A guest of the same name may come; each lease is its own.
        with store.hold([artifact.digest], "web-1"):
            assert store.is_held("web-1")
    Store(tmp_path)
    assert leases(tmp_path) == []


def test_the_folder_for_links_is_private_and_goes_with_the_holder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    main = store.hold([artifact.digest], "web-1")
    assert main.files == tmp_path / "leases/web-1.files"
    assert main.files.stat().st_mode & 0o777 == 0o700
    assert list(main.files.iterdir()) == []
    with store.extend("web-1", [artifact.digest]) as further:
        assert further.files == main.files
    (main.files / "blob").hardlink_to(artifact.layers[0].path)
    store.sweep()
    assert (main.files / "blob").samefile(artifact.layers[0].path)
    process = subprocess.Popen(["/bin/sleep", "1000"], pass_fds=[main.fd])
    main.close()
    try:
        store.sweep()
        assert main.files.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    store.sweep()
    assert leases(tmp_path) == []
    assert artifact.layers[0].path.stat().st_nlink == 1


def test_a_killed_command_leaves_no_lease_and_no_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)

    def hold_and_die() -> None:
        main = store.hold([artifact.digest], "web-1")
        store.extend("web-1", [artifact.digest])
        (main.files / "blob").hardlink_to(artifact.layers[0].path)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(hold_and_die), 0)
    assert len(leases(tmp_path)) == 3
    Store(tmp_path)
    assert leases(tmp_path) == []
    check_whole(tmp_path)


def test_what_was_changed_behind_our_back_is_not_held(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    path = artifact.layers[0].path
    with store.hold([artifact.digest], "web-1"):
        path.chmod(0o644)
        for attempt in ("web-2", "web-1"):
            with pytest.raises(StoreDamaged, match=r"rw-r--r--.*may have modified") as error:
                if attempt == "web-1":
                    store.extend(attempt, [artifact.digest])
                else:
                    store.hold([artifact.digest], attempt)
            assert "chmod 444" in error.value.hint
        os.truncate(path, 3)
        path.chmod(0o444)
        with pytest.raises(StoreDamaged, match=r"3 bytes instead of 7"):
            store.extend("web-1", [artifact.digest])
        path.chmod(0o644)
        path.write_bytes(b"content")
        path.chmod(0o444)
        store.extend("web-1", [artifact.digest]).close()
