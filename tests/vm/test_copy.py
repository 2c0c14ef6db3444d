"""`onecopy cp`: files and directories into guests and back, refusals, and killed copies.

Not here: hostile archives (tests/unit/guest/test_tar.py), the Python API (test_api.py).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB
from onecopy.store import Artifact
from tests.command import ONECOPY
from tests.vm.conftest import Boot, Clones, RunIn

#: Seconds after which something that must not block has blocked.
STUCK = 120


@pytest.fixture
def guest(clones: Clones) -> GuestRecord:
    return clones(1)[0]


def cp(source: str | Path, target: str | Path, code: int = 0) -> str:
    """What `onecopy cp`, which must end with ``code``, says on standard error."""
    argv = [ONECOPY, "cp", str(source), str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=STUCK)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def tree(path: Path) -> dict[str, object]:
    """All below a folder: modes, times, and what is in it."""
    found: dict[str, object] = {}
    for each in sorted([path, *path.rglob("*")]):
        stat = each.lstat()
        if each.is_symlink():
            content: object = each.readlink()
        elif each.is_dir():
            content = None
        else:
            content = each.read_bytes(), int(stat.st_mtime)
        found[str(each.relative_to(path))] = (stat.st_mode, content)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a folder"
    (path / "in it" / "deep").mkdir(parents=True)
    (path / "in it" / "-n").write_text("odd")
    (path / "in it" / ("long" * 60)).write_text("a long name")
    (path / "in it" / "ü\n'\"$").write_bytes(bytes(range(256)) * 9)
    (path / "empty").touch()
    (path / "private").write_text("x")
    (path / "private").chmod(0o600)
    (path / "program").write_text("#!/bin/sh\nexec readlink link\n")
    (path / "program").chmod(0o755)
    (path / "link").symlink_to("in it/-n")
    (path / "lost").symlink_to("nowhere")
    os.link(path / "program", path / "same program")
    os.utime(path / "program", (1_000_000_000, 1_000_000_000))
    (path / "in it" / "deep").chmod(0o555)
    return path


def test_a_tree_there_and_back(
    guest: GuestRecord, run_in: RunIn, folder: Path, tmp_path: Path
) -> None:
    cp(folder, f"{guest.name}:/work")
    done = run_in(guest, "sh", "-c", "cd /work && ./program && stat -c '%U %a %h %Y' program")
    assert done.stdout.split() == [b"in", b"it/-n", b"root", b"755", b"2", b"1000000000"]

    cp(f"{guest.name}:/work", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)
    assert (tmp_path / "back/program").samefile(tmp_path / "back/same program")
    # Into folders that there are, under its own name, with or without a slash.
    cp(f"{folder}/", f"{guest.name}:/tmp")
    cp(f"{guest.name}:/tmp/a folder/", f"{tmp_path}/back/")
    assert tree(tmp_path / "back/a folder") == tree(folder)
    assert not list(tmp_path.rglob(".onecopy*"))
    assert run_in(guest, "find", "/work", "/tmp", "-name", ".onecopy*").stdout == b""


def test_twenty_mebibytes_there_and_back(guest: GuestRecord, run_in: RunIn, tmp_path: Path) -> None:
    data = secrets.token_bytes(20 * MIB + 1)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "data").chmod(0o640)
    cp(tmp_path / "data", f"{guest.name}:tmp/there")
    done = run_in(guest, "sh", "-c", "sha256sum /tmp/there; stat -c %a /tmp/there")
    digest, _, mode = done.stdout.decode().split()
    assert (digest, mode) == (hashlib.sha256(data).hexdigest(), "640")
    # Over a file that there is.
    (tmp_path / "back").write_text("old")
    cp(f"{guest.name}:/tmp/there", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    cp(tmp_path / "back", f"{guest.name}:/etc/hostname")
    assert run_in(guest, "stat", "-c", "%s", "/etc/hostname").stdout == b"%d\n" % len(data)


def test_what_cannot_be_copied(
    guest: GuestRecord, run_in: RunIn, folder: Path, tmp_path: Path
) -> None:
    name = guest.name
    run_in(guest, "sh", "-c", "mkdir /d; ln -s /etc/passwd /d/out; mkfifo /p; mkdir /tmp/small")
    run_in(guest, "mount", "-t", "tmpfs", "-o", "size=1m", "small", "/tmp/small")
    (tmp_path / "big").write_bytes(bytes(2 * MIB))
    (tmp_path / "taken/work").mkdir(parents=True)
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd/pipe")
    table: list[tuple[str | Path, str | Path, int, str]] = [
        (f"{name}:/nothing", tmp_path, 3, f"there is no /nothing in {name}"),
        (f"{name}:/etc/passwd/", tmp_path, 2, "/etc/passwd/ is not a directory"),
        (f"{name}:/p", tmp_path, 2, "neither a file nor a directory"),
        (f"{name}:/etc/passwd", tmp_path / "no/such", 3, "there is no directory"),
        (f"{name}:/etc/passwd", f"{tmp_path}/no/", 2, "is not a directory"),
        (f"{name}:/etc/passwd", "/proc/x", 3, "/proc"),
        (f"{name}:/tmp", folder / "empty", 2, "Not a directory"),
        (f"{name}:/srv/../work", tmp_path / "taken", 5, "taken/work already exists"),
        (f"{name}:/d", tmp_path / "d", 10, "the link out points outside"),
        (f"{name}:", tmp_path, 2, "GUEST:PATH"),
        (tmp_path / "no", f"{name}:/", 3, "No such file"),
        (f"{folder}/empty/", f"{name}:/", 2, "is not a directory"),
        (folder, f"{name}:/etc/passwd", 5, "/etc/passwd already exists"),
        (folder, f"{name}:/no/such", 3, "there is no directory /no"),
        (folder / "empty", f"{name}:/no/", 2, "is not a directory"),
        (tmp_path / "odd", f"{name}:/odd", 2, "odd/pipe: neither"),
        (tmp_path / "big", f"{name}:/tmp/small/b", 9, f"disk in {name}: 2 MiB needed, 1 MiB"),
        (tmp_path / "big", f"{name}:/run/onecopy/tools/b", 10, "Read-only"),
        (folder, tmp_path / "b", 2, "only one"),
        (f"{name}:/a", f"{name}:/b", 2, "only one"),
        ("nobody:/a", tmp_path / "b", 3, "no guest 'nobody'"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for source, target, code, words in table:
        said = cp(source, target, code)
        assert words in said, said
        assert said.count("onecopy: ") == said.count("hint: ") == 1, said
    assert sorted(tmp_path.rglob("*")) == before
    assert run_in(guest, "find", "/", "-xdev", "-name", ".onecopy*").stdout == b""
    assert run_in(guest, "ls", "/tmp/small").stdout == b""


def test_killed_it_leaves_nothing_under_the_name(
    guest: GuestRecord, run_in: RunIn, tmp_path: Path
) -> None:
    # Larger than what is on its way at any time.
    run_in(guest, "sh", "-c", "mkdir /d; head -c 60000000 /dev/zero >/d/zeros")
    left: list[Path] = []
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        with subprocess.Popen(
            [ONECOPY, "cp", f"{guest.name}:/d", tmp_path / "d"], stderr=subprocess.DEVNULL
        ) as command:
            wait_for(partial(newly_begun, tmp_path, left))
            command.send_signal(number)
            assert command.wait(STUCK) == code
        assert all(path.name.startswith(".onecopy-") for path in tmp_path.iterdir())
        left = list(tmp_path.glob("*/*/zeros"))
        assert len(left) == (number == signal.SIGKILL)
    assert not list(tmp_path.iterdir())
    run_in(guest, "pkill", "tar")
    (tmp_path / "zeros").write_bytes(bytes(60_000_000))
    with subprocess.Popen(
        [ONECOPY, "cp", tmp_path / "zeros", f"{guest.name}:/z"], stderr=subprocess.DEVNULL
    ) as command:
        begun = "ls -a / | grep -e onecopy- -e '^z$'"
        wait_for(lambda: run_in(guest, "sh", "-c", begun).exit_code == 0)
        command.send_signal(signal.SIGINT)
        assert command.wait(STUCK) in (0, 130)
    names = run_in(guest, "ls", "-a", "/").stdout.decode().split()
    assert not [name for name in names if name.startswith(".onecopy")]
    if "z" in names:  # the signal came when it was whole already
        assert run_in(guest, "stat", "-c", "%s", "/z").stdout.strip() == b"60000000"


def newly_begun(folder: Path, before: list[Path]) -> bool:
    return any(path not in before for path in folder.glob("*/*/zeros"))


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STUCK
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_guest_that_ends_meanwhile(host: Runtime, guest: GuestRecord, tmp_path: Path) -> None:
    with subprocess.Popen(
        [ONECOPY, "cp", f"{guest.name}:/dev/../usr", tmp_path / "usr"],
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        wait_for(lambda: any(tmp_path.rglob("bin")))
        os.kill(guest.pid, signal.SIGKILL)
        said = command.communicate(timeout=STUCK)[1]
    assert (command.returncode, list(tmp_path.iterdir())) == (10, [])
    assert "the guest ended" in said


def test_an_image_without_tar(
    boot: Boot, static_root: Artifact, folder: Path, tmp_path: Path
) -> None:
    guest = boot(static_root, memory=128 * MIB)
    cp(folder, f"{guest.name}:/work")
    cp(f"{guest.name}:/work", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)
