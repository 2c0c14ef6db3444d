"""preload --pin: real processes that lock blobs and hold their leases."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from onecopy import cli
from onecopy.errors import AlreadyExists, InsufficientResources, InUse, NotFound, StoreDamaged
from onecopy.guest.observe.inspect import describe
from onecopy.guest.pagecache import pin, preload
from onecopy.guest.pagecache.pin import Pinned
from onecopy.linux import process
from onecopy.linux.counters import meminfo, residency
from onecopy.model import MIB, PAGE_SIZE, Reference
from onecopy.store import Artifact, Store
from tests.conftest import cannot_run
from tests.unit.store_kit import put

SIZE = 4 * MIB


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """At its end no process of it is left."""
    kind = subprocess.run(["stat", "-fc", "%T", tmp_path], capture_output=True, text=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        cannot_run("the temporary folder is memory: its pages cannot be dropped")
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] < SIZE and os.geteuid():
        cannot_run("this user may lock less than the test needs")
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / "store"))
    store = Store()
    yield store
    for record in store.leases():
        pid = json.loads((store.root / f"leases/{record.holder}.files/pin.json").read_bytes())
        os.kill(pid["pid"], signal.SIGKILL)


@pytest.fixture
def artifact(store: Store) -> Artifact:
    """A segment of which nothing is in memory."""
    artifact = put(store, "app:1", os.urandom(SIZE))
    preload.drop(store, artifact)
    assert resident(artifact) == 0
    return artifact


def resident(artifact: Artifact) -> int | None:
    return residency.resident_bytes(artifact.layers[0].path)


def until_released(store: Store, pinned: Pinned) -> None:
    deadline = time.monotonic() + 60
    while store.is_held(pinned.holder):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_stays_in_memory_until_unpinned(store: Store, artifact: Artifact) -> None:
    pinned = pin.pin(store, artifact)
    assert pinned.locked == resident(artifact) == SIZE
    assert 0 <= pinned.huge <= SIZE
    assert describe(store, artifact)["pinned"] is True
    print(f"huge pages: {pinned.huge}; {pinned.collapse or 'made'}")
    status = Path(f"/proc/{pinned.pid}/status").read_text()
    assert f"VmLck:\t{SIZE >> 10:8} kB" in status
    preload.drop(store, artifact)
    assert resident(artifact) == SIZE

    pin.unpin(store, artifact)
    assert not process.exists(pinned.pid)
    assert not store.is_held(pinned.holder)
    assert describe(store, artifact)["pinned"] is False
    assert list((store.root / "leases").iterdir()) == []
    preload.drop(store, artifact)
    assert resident(artifact) == 0
    with pytest.raises(NotFound):
        pin.unpin(store, artifact)


def test_it_has_a_session_of_its_own_and_nothing_of_ours(store: Store, artifact: Artifact) -> None:
    pinned = pin.pin(store, artifact)
    assert os.getsid(pinned.pid) == pinned.pid
    folder = Path(f"/proc/{pinned.pid}")
    found = sorted(str(fd.readlink()) for fd in (folder / "fd").iterdir())
    while any("pipe:" in name for name in found):  # it answers before it lets go of them
        found = sorted(str(fd.readlink()) for fd in (folder / "fd").iterdir())
    lease = str(store.root / f"leases/{pinned.holder}.json")
    assert set(found) == {"/dev/null", lease}


def test_it_is_a_user_until_it_is_killed(store: Store, artifact: Artifact) -> None:
    pinned = pin.pin(store, artifact)
    assert store.users(artifact.digest) == [pinned.holder]
    with pytest.raises(InUse, match=pinned.holder) as caught:
        store.remove(Reference("app", "1"))
    assert "--unpin" in caught.value.hint
    with pytest.raises(AlreadyExists):
        pin.pin(store, artifact)

    os.kill(pinned.pid, signal.SIGKILL)
    until_released(store, pinned)
    assert store.users(artifact.digest) == []
    preload.drop(store, artifact)
    assert resident(artifact) == 0
    again = pin.pin(store, artifact)
    assert again.pid != pinned.pid
    pin.unpin(store, artifact)
    store.remove(Reference("app", "1"))


def test_unpin_ends_no_other_process(store: Store, artifact: Artifact) -> None:
    pinned = pin.pin(store, artifact)
    other = subprocess.Popen(["sleep", "1000"])
    record = store.root / f"leases/{pinned.holder}.files/pin.json"
    record.write_text(json.dumps({"pid": other.pid, "start_ticks": 1}))
    pin.unpin(store, artifact)
    assert other.poll() is None
    other.kill()
    other.wait()
    os.kill(pinned.pid, signal.SIGKILL)
    until_released(store, pinned)


def test_too_little_memory(
    store: Store, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = meminfo.read()
    monkeypatch.setattr(meminfo, "read", lambda: replace(now, available=SIZE))
    with pytest.raises(InsufficientResources) as caught:
        pin.pin(store, artifact)
    assert (caught.value.what, caught.value.available) == ("memory", SIZE)
    assert store.leases() == []


def test_too_little_may_be_locked(
    store: Store, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pin, "capabilities", lambda: 0)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (PAGE_SIZE, PAGE_SIZE))
    with pytest.raises(InsufficientResources, match="may lock"):
        pin.pin(store, artifact)
    assert store.leases() == []


def test_an_error_of_the_process_is_told(store: Store, artifact: Artifact) -> None:
    files = [("/no/such/file", SIZE, [(0, SIZE)])]
    with (
        store.hold([artifact.digest], "pinned-x") as lease,
        pytest.raises(StoreDamaged, match="/no/such/file"),
    ):
        pin._start(lease, files, SIZE)
    assert not store.is_held("pinned-x")


def test_a_killed_command_leaves_none(store: Store, artifact: Artifact) -> None:
    """Whoever started it is gone before it answers: nobody would ever know of it."""
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "onecopy.linux.page_locker"],
        stdin=subprocess.PIPE,
        stdout=write,
        stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    path = artifact.layers[0].path
    wanted = {"files": [[str(path), SIZE, [[0, SIZE]]]], "record": str(store.cache / "record")}
    child.communicate(json.dumps(wanted).encode(), timeout=60)
    assert child.returncode


def test_the_command(store: Store, artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preload", "--pin", "app:1"]) == 0
    assert capsys.readouterr().out.startswith("app:1 pinned: 4.0 MiB, ")
    assert cli.main(["preload", "--pin", "app:1"]) == AlreadyExists.exit_code
    assert cli.main(["rm", "app:1"]) == InUse.exit_code
    assert cli.main(["preload", "--unpin", "app:1"]) == 0
    assert cli.main(["preload", "--unpin", "app:1"]) == NotFound.exit_code
    assert cli.main(["preload", "--pin", "--json", "app:1"]) == 0
    assert cli.main(["preload", "--pin", "--whole", "app:1"]) == 2
