"""Running readers over many inputs: children with limits, and a watchdog over them.

A child reads a chunk of inputs and says where it is in memory that it shares with the watchdog,
which so knows the input that killed it, or that it does not come back from. Not here: what the
inputs are (mutate.py), what reads them (readers.py).
"""

from __future__ import annotations

import base64
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import msgspec

from onecopy.linux import syscall
from tests.fuzz.mutate import make
from tests.fuzz.readers import Reader

#: CPU seconds for one input, and the seconds after which its child is killed.
_CPU, _WALL = 2.0, 30.0
#: Bytes of address space beyond what a child begins with, and of a file that it writes.
_MEMORY, _FILE = 512 << 20, 64 << 20
_CHUNK = 2000
_PR_SET_PDEATHSIG = 1
_MEMORY_FOLDER = Path("/dev/shm")


class Failure(NamedTuple):
    """An input that broke the rule."""

    reader: str
    number: int
    what: str
    data: bytes
    """As small as was simply found."""

    def line(self, seed: int) -> str:
        """A command that shows it again."""
        return (
            f"script/fuzz --seed {seed} --reader '{self.reader}' --number {self.number}"
            f"  # {self.what}; {base64.b64encode(self.data[:300]).decode()}"
        )


class Tally(NamedTuple):
    """What became of a reader's inputs."""

    inputs: int
    seconds: float
    failures: tuple[Failure, ...]


class _TooSlow(BaseException):
    pass


class _Child(NamedTuple):
    pid: int
    reader: Reader
    start: int
    end: int
    place: mmap
    out: Path
    began: float


def run(seed: int, reader: Reader, count: int, processes: int) -> Tally:
    """Read ``count`` inputs in ``processes`` children at once."""
    chunks = [(at, min(at + _CHUNK, count)) for at in range(0, count, _CHUNK)]
    failures: list[Failure] = []
    began = time.monotonic()
    with _folder() as folder:
        children: list[_Child] = []
        while chunks or children:
            while chunks and len(children) < processes:
                children.append(_begin(seed, reader, *chunks.pop(), folder))
            time.sleep(0.01)
            for child in [each for each in children if _is_over(each)]:
                children.remove(child)
                found, left = _ended(seed, child)
                failures += found
                if left < child.end:
                    chunks.append((left, child.end))
    return Tally(count, time.monotonic() - began, tuple(failures))


def one(seed: int, reader: Reader, number: int) -> tuple[bytes, str]:
    """An input, and what its reader makes of it here and now."""
    data = make(seed, reader.name, number, reader.samples)
    with _folder() as folder:
        return data, _try(reader, data, folder) or "as documented"


@contextmanager
def _folder() -> Iterator[Path]:
    where = _MEMORY_FOLDER if os.access(_MEMORY_FOLDER, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="onecopy-fuzz-", dir=where))
    try:
        yield folder
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)


def _begin(seed: int, reader: Reader, start: int, end: int, folder: Path) -> _Child:
    place, out = mmap(-1, 8), Path(tempfile.mkdtemp(dir=folder))
    place[:] = start.to_bytes(8, "little")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            _limit()
            failures = _chunk(seed, reader, range(start, end), place, out)
            (out / "failures").write_bytes(msgspec.msgpack.encode(failures))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return _Child(pid, reader, start, end, place, out, time.monotonic())


def _limit() -> None:
    # None goes on without the watchdog.
    syscall.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _too_slow)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)


def _too_slow(*_: object) -> None:
    raise _TooSlow


def _chunk(seed: int, reader: Reader, numbers: range, place: mmap, out: Path) -> list[Failure]:
    failures = []
    os.chdir(out)
    open_before = _open_files()
    for number in numbers:
        place[:] = number.to_bytes(8, "little")
        data = make(seed, reader.name, number, reader.samples)
        if what := _try(reader, data, out):
            data = _smaller(data, partial(_fails, reader, out, what))
            failures.append(Failure(reader.name, number, what, data))
    if _open_files() != open_before:
        failures.append(Failure(reader.name, numbers[-1], "descriptors stay open", b""))
    return failures


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _fails(reader: Reader, out: Path, what: str, data: bytes) -> bool:
    return _try(reader, data, out) == what


def _try(reader: Reader, data: bytes, out: Path) -> str:
    """What breaks the rule, or nothing."""
    folder = out / "now"
    folder.mkdir()
    what = ""
    signal.setitimer(signal.ITIMER_PROF, _CPU)
    try:
        reader.read(data, folder)
    except reader.expected:
        pass
    except _TooSlow:
        what = f"took more than {_CPU:g} s of a processor"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    _remove(folder)
    left = [path.name for path in out.iterdir()]
    for name in left:
        _remove(out / name)
    return what or (f"left {left[0]!r} behind" if left else "")


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):
        subprocess.run(["rm", "-rf", "--", path], check=True)


def _smaller(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Leave out what can be, in ever smaller pieces."""
    size, tries = len(data) // 2, 200
    while size and tries:
        for at in range(0, len(data), size):
            less = data[:at] + data[at + size :]
            tries -= 1
            if fails(less):
                data = less
                break
            if not tries:
                break
        else:
            size //= 2
    return data


def _is_over(child: _Child) -> bool:
    """Whether it has ended; one that stays at its input is made to."""
    with suppress(ChildProcessError):
        info = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is not None:
            return True
    at = bytes(child.place[:])
    # The time is noted by the next number: a list of what was seen last.
    last, since = _SEEN.get(child.pid, (b"", time.monotonic()))
    if at != last:
        _SEEN[child.pid] = (at, time.monotonic())
    elif time.monotonic() - since > _WALL:
        os.kill(child.pid, signal.SIGKILL)
    return False


#: Child -> where it was, and since when.
_SEEN: dict[int, tuple[bytes, float]] = {}


def _ended(seed: int, child: _Child) -> tuple[list[Failure], int]:
    """What it found, and the number to go on with."""
    _, status = os.waitpid(child.pid, 0)
    _SEEN.pop(child.pid, None)
    at = int.from_bytes(child.place[:], "little")
    child.place.close()
    if status == 0:
        data = (child.out / "failures").read_bytes()
        return msgspec.msgpack.decode(data, type=list[Failure]), child.end
    how = os.waitstatus_to_exitcode(status)
    what = "did not come back" if how == -signal.SIGKILL else f"its process ended with {how}"
    data = make(seed, child.reader.name, at, child.reader.samples)
    # What the child has found before is found again when this is mended.
    return [Failure(child.reader.name, at, what, data)], at + 1
