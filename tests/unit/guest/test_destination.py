"""Where copies go on the host: names, and what killed copies leave."""

import fcntl
import io
import os
import secrets
import tarfile
import tempfile
from pathlib import Path

import pytest

from onecopy.errors import AlreadyExists, InsufficientResources, InvalidInput, NotFound
from onecopy.guest.transfer.destination import finish, hidden, host_errors, place
from onecopy.guest.transfer.tar import Unpacker, Unusable
from tests.unit.other_user import NOBODY, as_nobody


def test_names_are_cp_s(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken/name").mkdir(parents=True)
    assert place(tmp_path, "name") == tmp_path / "name"
    assert place(f"{tmp_path}/", "name") == tmp_path / "name"
    assert place(tmp_path / "new", "name") == tmp_path / "new"
    assert place(tmp_path / "file", "name") == tmp_path / "file"
    wrong = [
        (InvalidInput, f"{tmp_path}/new/", "name"),
        (InvalidInput, f"{tmp_path}/file/", "name"),
        (InvalidInput, f"{tmp_path}", ".."),
        (InvalidInput, f"{tmp_path}", ""),
        (NotFound, f"{tmp_path}/no/new", "name"),
        (AlreadyExists, f"{tmp_path}/taken", "name"),
    ]
    for kind, target, name in wrong:
        with pytest.raises(kind):
            place(target, name)


def test_only_what_nobody_makes_any_more_is_removed(tmp_path: Path) -> None:
    killed = tmp_path / ".onecopy-killed"
    (killed / "content").mkdir(parents=True)
    with hidden(tmp_path) as one:
        assert not killed.exists()
        with hidden(tmp_path) as other:
            assert one.is_dir() and other.is_dir() and one != other
        assert not other.exists()
    assert list(tmp_path.iterdir()) == []


def _read_only_copy() -> int:
    with tempfile.TemporaryDirectory() as folder:
        final = Path(folder) / "copy"
        with hidden(Path(folder)) as work:
            (work / "content").mkdir(0o555)
            finish(work / "content", final)
        return final.stat().st_mode & 0o777


def test_a_read_only_folder_gets_its_name() -> None:
    assert as_nobody(_read_only_copy) == 0o555


@pytest.mark.parametrize(
    ("number", "kind"),
    [(28, InsufficientResources), (2, NotFound), (20, InvalidInput), (17, AlreadyExists)],
)
def test_errors_say_which_file(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind), host_errors(tmp_path):
        raise OSError(number, "why", "which")
    with pytest.raises(ConnectionError), host_errors(tmp_path):
        raise ConnectionResetError(104, "by the peer")


def test_what_others_leave_in_a_shared_folder_is_nothing_to_a_copy(tmp_path: Path) -> None:
    """Their locks, links, pipes and folders: nothing waits for them, and none of them goes."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kept").touch()
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / ".onecopy-link").symlink_to(mine)
    (shared / ".onecopy-nowhere").symlink_to("nowhere")
    os.mkfifo(shared / ".onecopy-pipe")
    theirs = shared / ".onecopy-theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY) if os.geteuid() == 0 else None
    lock = os.open(shared, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with hidden(shared) as work:
            (work / "content").write_text("whole")
            finish(work / "content", shared / "copy")
    finally:
        os.close(lock)
    assert (shared / "copy").read_text() == "whole"
    assert (mine / "kept").exists()
    left = {".onecopy-link", ".onecopy-nowhere", ".onecopy-pipe", "copy"}
    left |= {theirs.name} if os.geteuid() == 0 else set()
    assert {path.name for path in shared.iterdir()} == left


def test_a_hidden_folder_that_is_moved_and_replaced_is_written_all_the_same(
    tmp_path: Path,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    with hidden(tmp_path) as work:
        name = work.readlink()
        name.rename(tmp_path / "moved")
        name.symlink_to(tmp_path / "elsewhere")
        (work / "content").mkdir()
        finish(work / "content", tmp_path / "copy")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "copy").is_dir()


def test_errors_name_the_folder_as_the_user_does(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught, host_errors(tmp_path), hidden(tmp_path) as work:
        (work / "no/content").mkdir()
    assert "/proc/" not in caught.value.message and str(tmp_path) in caught.value.message


@pytest.mark.parametrize("link", ["../content/x", "../copy/x", "sub/../../content/x"])
def test_a_link_leads_nowhere_by_the_copy_s_later_name(tmp_path: Path, link: str) -> None:
    (tmp_path / "content").mkdir()
    (tmp_path / "content/x").write_text("the host's")
    with hidden(tmp_path) as work, pytest.raises(Unusable):
        unpacker = Unpacker(work / secrets.token_hex(16))
        unpacker.feed(_archive_with_link(link))
        unpacker.finish()


def _archive_with_link(target: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in (".", "./sub"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)
        link = tarfile.TarInfo("./link")
        link.type, link.linkname = tarfile.SYMTYPE, target
        archive.addfile(link)
    return stream.getvalue()
