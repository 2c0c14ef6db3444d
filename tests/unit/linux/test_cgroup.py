"""Control groups on recorded trees: where ours are, what is written there, and why there are none.

Not here: that the kernel keeps to them (tests/vm/test_cgroup.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onecopy.linux import cgroup
from tests.unit.other_user import as_nobody

PID = 4711


@pytest.fixture
def make(tmp_path: Path) -> Path:
    """A host with version 2 alone, where we are in a session's scope, as systemd has it."""
    return tree(tmp_path, "/user.slice/user-0.slice/session-1.scope")


def tree(root: Path, mine: str, controllers: str = "cpu memory pids") -> Path:
    mount = root / "sys/fs/cgroup"
    folder = root / "proc/self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(f"0::{mine}\n")
    (folder / "mountinfo").write_text(
        "22 1 0:20 / / rw - ext4 /dev/root rw\n"
        "31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    path = mount / mine.strip("/")
    path.mkdir(parents=True)
    for group in (path, *path.parents):
        if group.is_relative_to(mount):
            (group / "cgroup.controllers").write_text(controllers)
            (group / "cgroup.subtree_control").write_text(controllers)
    return root


def made(root: Path, above: str = "") -> Path:
    """Our group, with what the kernel would show in it."""
    ours = root / "sys/fs/cgroup" / above / "onecopy"
    ours.mkdir()
    (ours / "cgroup.controllers").write_text("cpu memory pids")
    (ours / "cgroup.subtree_control").write_text("")
    return ours


def test_roots_are_below_the_topmost(make: Path) -> None:
    ours = made(make)
    group = cgroup.create(PID, 1 << 30, 100, make)
    assert group and group.parent == ours
    # As the kernel is told: it shows "memory pids" afterwards.
    assert (ours / "cgroup.subtree_control").read_text() == "+memory +pids"
    told = {name: (group / name).read_text() for name in ("memory.max", "pids.max", "cgroup.procs")}
    assert told == {"memory.max": str(1 << 30), "pids.max": "100", "cgroup.procs": str(PID)}
    assert cgroup.processes(make) == {PID: group}
    assert cgroup.why_not(make) == ""


def test_more_memory_comes_with_what_is_plugged_in(make: Path) -> None:
    made(make)
    group = cgroup.create(PID, 1000, 100, make)
    assert group
    theirs = make / f"proc/{PID}"
    theirs.mkdir()
    (theirs / "cgroup").write_text(f"1:name=systemd:/\n0::/onecopy/{group.name}\n")
    assert cgroup.of(PID, make) == group
    cgroup.raise_memory_limit(PID, 24, make)
    assert (group / "memory.max").read_text() == "1024"
    # What is not ours stays as it is.
    (theirs / "cgroup").write_text("0::/user.slice\n")
    assert cgroup.of(PID, make) is None
    cgroup.raise_memory_limit(PID, 24, make)


def test_a_sweep_takes_what_is_empty(make: Path) -> None:
    ours = made(make)
    left, used = ours / "left", ours / "used"
    for group in (left, used):
        group.mkdir()
    # The kernel refuses to remove one with processes, as the file system does one with files.
    (used / "cgroup.procs").write_text("1\n")
    cgroup.sweep(make)
    assert not left.exists() and used.exists()


def test_what_was_killed_for_memory(make: Path) -> None:
    made(make)
    group = cgroup.create(PID, 1 << 30, 100, make)
    assert group
    events = "low 0\nhigh 0\nmax 31\noom 1\noom_kill {}\noom_group_kill 0\n"
    (group / "memory.events").write_text(events.format(1))
    # It lives: what was killed was another one.
    assert not cgroup.was_short_of_memory(PID, make)
    (group / "cgroup.procs").write_text("")
    assert cgroup.was_short_of_memory(PID, make)
    assert not cgroup.was_short_of_memory(PID // 10, make)
    (group / "memory.events").write_text(events.format(0))
    assert not cgroup.was_short_of_memory(PID, make)


def test_a_group_that_a_sweep_took_is_made_again(
    make: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(make)
    write = Path.write_text
    taken: list[Path] = []

    def take_once(path: Path, text: str) -> int:
        if path.name == "cgroup.procs" and not taken:
            taken.append(path)
            raise FileNotFoundError(path)
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", take_once)
    group = cgroup.create(PID, 1, 1, make)
    assert group and group != taken[0].parent


def test_an_ordinary_user_has_what_was_delegated(tmp_path: Path) -> None:
    above = "user.slice/user@65534.service"
    root = tree(tmp_path, f"/{above}/app.slice/shell.scope")
    mount = root / "sys/fs/cgroup"
    # Who may not enter a folder of root's sees none of it.
    for path in (root, *root.parents):
        path.chmod(path.stat().st_mode | 0o011)

    made(root, above)
    for path in (mount / above, *(mount / above).rglob("*")):
        os.chown(path, 65534, 65534)
    found = as_nobody(lambda: str(cgroup.ours(root)))
    assert found == str(mount / above / "onecopy")
    os.chown(mount / above, 0, 0)
    os.chown(mount / above / "app.slice", 0, 0)
    os.chown(mount / above / "app.slice/shell.scope", 0, 0)
    assert "delegated" in as_nobody(lambda: cgroup.why_not(root))


def test_names_of_any_bytes(make: Path) -> None:
    """Other people mount, and make groups, where they like."""
    ours = made(make)
    file = make / "proc/self/mountinfo"
    file.write_bytes(
        b"21 1 0:9 / /mnt/\xff\\040x\x85y rw - ext4 /dev/\xfe rw\n" + file.read_bytes()
    )
    (make / "proc/self/cgroup").write_bytes(b"0::/user.slice/\xff\x85\n")
    assert cgroup.ours(make) == ours
    assert cgroup.why_not(make) == ""


def test_hosts_without(tmp_path: Path) -> None:
    first = tree(tmp_path / "1", "/", controllers="")
    assert "version 1" in cgroup.why_not(first)
    assert cgroup.create(PID, 1, 1, first) is None
    (first / "proc/self/mountinfo").write_text("22 1 0:20 / / rw - ext4 /dev/root rw\n")
    assert "no cgroup2" in cgroup.why_not(first)
    cgroup.sweep(first)
    # Above what a container sees.
    outside = tree(tmp_path / "2", "/")
    (outside / "proc/self/cgroup").write_text("0::/../../other\n")
    assert cgroup.ours(outside) is None
