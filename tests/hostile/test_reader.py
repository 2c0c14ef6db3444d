"""A reader that lies: whoever made the disk image has taken it over.

It says anything at its two ports. The rule: BadSource or InsufficientResources, in time, in bounded
memory, and no file outside of the folder that is unpacked into. Not here: real ones
(vm/test_disk_images.py).
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecopy.errors import BadSource
from onecopy.images.disk_files import DiskTree
from onecopy.images.disk_reader import Reader
from onecopy.model import MIB
from onecopy.vmm.confined_tool import Limits, Task, running
from onecopy.vmm.reader_vm import Running
from tests.conftest import cannot_run

#: An answer to each question of a whole disk with a root and a home.
HONEST = {
    "table": "disk 8388608\nID_PART_TABLE_TYPE=gpt\n"
    "partition 1 2048 1048576 0 aa one\nID_FS_TYPE=ext4\nID_FS_UUID_ENC=11\n"
    "partition 2 4096 1048576 0 bb two\nID_FS_TYPE=btrfs\nID_FS_UUID_ENC=22\n",
    "look": "- 1024 100 50 100 50\n",
    "fstab": "/dev/vda2 /home btrfs subvol=x 0 0\n",
    "add": "1024 100 50 100 50\n",
    "wrong": "",
}

Serve = Callable[[socket.socket, socket.socket], None]


@contextmanager
def lying(serve: Serve) -> Iterator[Reader]:
    """A reader whose guest is ``serve(control, data)``, in a thread."""
    control, its_control = socket.socketpair()
    data, its_data = socket.socketpair()
    control.setblocking(False)
    data.setblocking(False)

    def work() -> None:
        with contextlib.suppress(OSError), its_control, its_data:
            serve(its_control, its_data)

    thread = threading.Thread(target=work, daemon=True)
    with running(Task(["sleep", "600"], limits=Limits(seconds=600))) as tool, control, data:
        thread.start()
        yield Reader(Running(tool, control, data))
    thread.join(10)


def saying(answer: bytes, *, end: bool = False) -> Serve:
    """A guest that answers the first question like this."""

    def serve(control: socket.socket, data: socket.socket) -> None:
        del data
        control.recv(65536)
        control.sendall(answer)
        while not end and control.recv(65536):
            pass

    return serve


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\n",
        b"\0" * 64,
        b"\xff\xfe 3\n",
        b"0 -1\n",
        b"0 " + b"9" * 5000 + b"\n",
        b"9" * 5000 + b" 3\n",
        b"0 9999999\n",
        b"0 1048577\n",
        b"0 5\nabc",
        b"0 3",
        b"",
        b'{"a":' * 100_000,
    ],
)
def test_an_answer_that_makes_no_sense(answer: bytes) -> None:
    start = time.monotonic()
    with lying(saying(answer)) as guest, pytest.raises(BadSource, match="reader guest failed"):
        guest.ask("table", patience=0.5)
    assert time.monotonic() - start < 60


def test_one_that_ends_at_once() -> None:
    with (
        lying(saying(b"0 5\nab", end=True)) as guest,
        pytest.raises(BadSource, match="it ended"),
    ):
        threading.Timer(0.5, guest._tool.end).start()
        guest.ask("table", patience=30)


def test_a_flood_of_answers_takes_no_memory() -> None:
    def serve(control: socket.socket, data: socket.socket) -> None:
        del data
        while True:
            control.sendall(b"x" * MIB)

    tracemalloc.start()
    try:
        with lying(serve) as guest, pytest.raises(BadSource):
            guest.ask("table", patience=5)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


def test_a_flood_of_files_is_taken_as_it_is_read() -> None:
    def serve(control: socket.socket, data: socket.socket) -> None:
        control.recv(65536)
        while True:
            data.sendall(b"x" * MIB)

    with lying(serve) as guest:
        files = guest.files([], 60)
        tracemalloc.start()
        try:
            assert sum(len(files.read(MIB) or b"") for _ in range(100)) > MIB
            assert tracemalloc.get_traced_memory()[1] < 16 * MIB
        finally:
            tracemalloc.stop()


def test_files_that_never_end() -> None:
    def serve(control: socket.socket, data: socket.socket) -> None:
        control.recv(65536)
        while True:
            data.sendall(b"x")
            time.sleep(0.01)

    with (
        lying(serve) as guest,
        pytest.raises(BadSource, match=r"exceeded its time limit|sent nothing for"),
    ):
        guest.files([], 1).readall()


def test_files_that_do_not_come() -> None:
    with lying(saying(b"")) as guest, pytest.raises(BadSource, match="sent nothing for"):
        guest.files([], 1).readall()


def test_more_files_than_it_says() -> None:
    said = b"Total bytes written: 10 (10B, 1B/s)\n"

    def serve(control: socket.socket, data: socket.socket) -> None:
        control.recv(65536)
        data.sendall(b"x" * 100)
        time.sleep(0.3)
        control.sendall(b"0 %d\n%b" % (len(said), said))
        control.recv(65536)

    with lying(serve) as guest, pytest.raises(BadSource, match="but reported"):
        guest.files([], 30).readall()


def honest(overrides: dict[str, bytes], archive: bytes = b"") -> Serve:
    """A guest that answers like an honest one, but for these questions."""

    def serve(control: socket.socket, data: socket.socket) -> None:
        with control.makefile("rb") as questions:
            for line in questions:
                command = line.split()[0].decode()
                text = HONEST.get(command, "").encode()
                if command == "look" and line.split()[1] == b"1":
                    text = b". 1024 100 50 100 50\n"
                if command == "copy":
                    data.sendall(archive)
                    text = b"Total bytes written: %d (1B, 1B/s)\n" % len(archive)
                text = overrides.get(command, text)
                control.sendall(b"0 %d\n%b" % (len(text), text))

    return serve


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """A tar of (name, type, link or content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, text in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
            else:
                member.linkname = text
                tar.addfile(member)
    return out.getvalue()


@pytest.mark.parametrize("way", ["absolute", "up", "link", "link in two steps", "hard link"])
def test_no_archive_leads_out(tmp_path: Path, way: str) -> None:
    if os.geteuid() != 0:
        cannot_run("disk images are unpacked by root only")
    into, beside = tmp_path / "into", tmp_path / "beside"
    into.mkdir()
    beside.mkdir()
    (beside / "mine").write_text("mine")
    members = {
        "absolute": [(f"{beside}/mine", tarfile.REGTYPE, "theirs")],
        "up": [("../beside/mine", tarfile.REGTYPE, "theirs")],
        "link": [("a", tarfile.SYMTYPE, str(beside)), ("a/mine", tarfile.REGTYPE, "theirs")],
        "link in two steps": [
            ("a", tarfile.SYMTYPE, ".."),
            ("a/beside/mine", tarfile.REGTYPE, "theirs"),
        ],
        "hard link": [("a", tarfile.LNKTYPE, "../beside/mine"), ("a", tarfile.REGTYPE, "theirs")],
    }[way]
    with lying(honest({}, archive(*members))) as guest:
        tree = DiskTree(guest, None)
        with contextlib.suppress(BadSource):
            tree.copy(into)
    assert (beside / "mine").read_text() == "mine"
    assert [path.name for path in beside.iterdir()] == ["mine"]
    assert (beside / "mine").stat().st_nlink == 1


def test_an_honest_one_passes(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("disk images are unpacked by root only")
    members = archive(("./file", tarfile.REGTYPE, "text"), ("./null", tarfile.CHRTYPE, ""))
    (tmp_path / "into").mkdir()
    with lying(honest({"subvolumes": b"x\nother\n"}, members)) as guest:
        tree = DiskTree(guest, None)
        tree.copy(tmp_path / "into")
        assert (tmp_path / "into/file").read_text() == "text"
        assert tree.left_out() == ["the subvolume other"]


@pytest.mark.parametrize(
    ("fs", "said", "hint"),
    [
        ("crypto_LUKS", "encrypted", "cryptsetup"),
        ("LVM2_member", "LVM", "vgchange"),
        ("linux_raid_member", "RAID", "mdadm"),
        ("swap", "swap", "#NUMBER"),
    ],
)
def test_what_holds_no_files(fs: str, said: str, hint: str) -> None:
    table = f"disk 1048576\nID_FS_TYPE={fs}\n".encode()
    with (
        lying(honest({"table": table})) as guest,
        pytest.raises(BadSource, match=f"the whole disk .1.0 MiB.: .*{said}") as caught,
    ):
        DiskTree(guest, None)
    assert hint in caught.value.hint


WORDS = st.sampled_from(
    [
        *("disk", "partition", "1", "0", "-1", "9" * 30, "ID_FS_TYPE=ext4", "ID_FS_TYPE=\x1b[2J"),
        *("- 1", ". 1024 1 1 1 1", "/dev/vda2 /x ext4", "/dev/\x1b[2J /\x1b] ext4", "\n", " "),
        *("/dev/vda1 / btrfs subvol=..", "\\x41", "1024 9999999999999999999 0 0 0", "\u0663"),
        *("ID_PART_TABLE_TYPE=gpt", "\ud800", "a\0b"),
    ]
)
TEXT = st.one_of(
    st.binary(max_size=200),
    st.lists(WORDS).map(lambda words: " ".join(words).encode(errors="surrogatepass")),
)


@settings(max_examples=60)
@given(
    overrides=st.dictionaries(
        st.sampled_from(["table", "look", "fstab", "add", "wrong", "subvolumes", "empty"]), TEXT
    )
)
def test_whatever_it_says_is_refused_or_taken(overrides: dict[str, bytes]) -> None:
    with lying(honest(overrides)) as guest:
        try:
            told = DiskTree(guest, None).left_out()
        except BadSource as error:
            told = [*error.message.splitlines(), error.hint]
    assert all(line.isprintable() for line in told)
