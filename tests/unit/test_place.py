"""Where copies go on the host: names, and what killed copies leave."""

import tempfile
from pathlib import Path

import pytest

from onecopy.errors import AlreadyExists, InvalidInput, NotEnough, NotFound
from onecopy.guest.place import finish, hidden, host_errors, place
from tests.unit.other_user import as_nobody


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
    ("number", "kind"), [(28, NotEnough), (2, NotFound), (20, InvalidInput), (17, AlreadyExists)]
)
def test_errors_say_which_file(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind), host_errors(tmp_path):
        raise OSError(number, "why", "which")
    with pytest.raises(ConnectionError), host_errors(tmp_path):
        raise ConnectionResetError(104, "by the peer")
