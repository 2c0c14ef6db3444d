"""How files of others are opened, and those of processes read."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onecopy.errors import InvalidInput, NotFound, NotPermitted, Unreadable
from onecopy.linux import cow_pages, files, process
from onecopy.linux.counters import frame_flags, ksm, pagemap
from tests.unit.other_user import as_nobody

GONE = 2**22 + 1


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(InvalidInput, match="not a regular file"):
            files.open_regular(path)
    for path in (Path("/x\0y"), Path("/" + "x" * 5000)):
        with pytest.raises(InvalidInput, match="cannot open"):
            files.open_regular(path)
    for path in (tmp_path / "none", Path("/dev/null/x")):
        with pytest.raises(NotFound):
            files.open_regular(path)


def test_it_is_the_file_that_was_meant(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("one")
    other.write_text("two")
    found = path.stat()
    identity = found.st_dev, found.st_ino
    fd = files.open_regular(path, identity)
    assert os.read(fd, 9) == b"one" and not os.get_blocking(fd)
    os.close(fd)
    path.unlink()
    path.symlink_to(other)
    with pytest.raises(NotFound, match="another file"):
        files.open_regular(path, identity)
    os.close(files.open_regular(path))


def test_a_file_of_somebody_else() -> None:
    def attempt() -> str:
        try:
            files.open_regular(Path("/etc/shadow"))
        except NotPermitted as error:
            return error.message
        return ""

    assert "/etc/shadow" in as_nobody(attempt)


def test_numbers() -> None:
    assert [files.number(text) for text in (b" 12\n", "-3", b"0")] == [12, -3, 0]
    for text in (None, b"", b"x", "9" * 5000, b"1 2", "\u0665"):
        assert files.number(text) is None


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    (folder / "smaps").write_bytes(bytes(100_000))
    assert len(files.read_of_process(7, "smaps", tmp_path, most=100_000) or b"") == 100_000
    with pytest.raises(Unreadable, match="is larger than"):
        files.read_of_process(7, "smaps", tmp_path, most=99_999)
    assert len(files.read_of_process(7, "smaps", tmp_path, most=9, cut=True) or b"") == 9
    (folder / "cmdline").write_bytes(b"a\0" * (1 << 20))
    assert len(process.cmdline(7, tmp_path)) == 1 << 19
    # A folder where the kernel has none: what nobody foresees is told all the same.
    (folder / "status").mkdir()
    with pytest.raises(Unreadable):
        process.memory(7, tmp_path)


@pytest.mark.parametrize(
    ("text", "argv"),
    [(b"", []), (b"a\0", ["a"]), (b"\0", [""]), (b"a\0b", ["a", "b"]), (b"a\0\0", ["a", ""])],
)
def test_command_lines(tmp_path: Path, text: bytes, argv: list[str]) -> None:
    """The last one's end may be overwritten, as by setproctitle()."""
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(text)
    assert process.cmdline(7, tmp_path) == argv


def test_who_a_process_acts_as() -> None:
    assert process.owner(os.getpid()) == os.geteuid()
    with pytest.raises(NotFound):
        process.owner(GONE)


def test_a_process_with_the_name_of_the_kernels_thread() -> None:
    code = "open('/proc/self/comm', 'w').write('ksmd'); print(flush=True); input()"
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        found = ksm.thread()
        assert found != child.pid
        assert found is None or process.stat(found).is_kernel_thread
        child.kill()


def test_memory_of_devices_has_no_flags(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/kpageflags").write_bytes(np.arange(10, dtype=np.uint64).tobytes())
    found = frame_flags.flags(np.array([3, 9, 10, 400, 10**9], np.uint64), tmp_path)
    assert found.tolist() == [3, 9, 0, 0, 0]


def test_more_than_any_host_has() -> None:
    with pytest.raises(Unreadable):
        pagemap.read(os.getpid(), 0, 1 << 40)


def test_a_process_that_ends_while_its_memory_is_put_back(tmp_path: Path) -> None:
    content = os.open("/dev/zero", os.O_RDONLY)
    with subprocess.Popen(["sleep", "60"]) as child:
        where = Path(f"/proc/{child.pid}/maps").read_text().split("-")[0]
        run = cow_pages.Run(int(where, 16), 0, 4096)
        with cow_pages._memory(child.pid, os.O_RDWR) as fd:
            child.kill()
            child.wait()
            with pytest.raises(OSError, match="returned 0 bytes"):
                files.write_at(fd, b"x", run.address)
    with pytest.raises(NotFound):
        cow_pages.revert(child.pid, [run], content)
    os.close(content)
