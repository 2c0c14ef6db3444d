"""Whether something is held, or left by who was killed: with real processes and threads."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from onecopy.guest.run_directory import RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.linux.lock import is_held, is_left, locked_blocking
from onecopy.store import Store

HOLD = """
import sys, time
from pathlib import Path
from onecopy.linux.lock import locked_blocking
with locked_blocking(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_held_is_left(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert not is_held(mark) and not is_left(mark)
    with subprocess.Popen([sys.executable, "-c", HOLD, mark], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        assert is_held(mark) and not is_left(mark)
        process.send_signal(signal.SIGKILL)
    assert not is_held(mark) and is_left(mark)


@contextmanager
def beside(look: Callable[[], None]) -> Iterator[None]:
    """Do ``look`` again and again in a thread; at the end raise what it raised."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            look()

    with ThreadPoolExecutor(1) as pool:
        looker = pool.submit(run)
        try:
            yield
        finally:
            done.set()
            looker.result()


def test_what_its_holder_removes_is_never_left(tmp_path: Path) -> None:
    mark, seen = tmp_path / "mark", []
    with beside(lambda: seen.append(is_left(mark))):
        for number in range(3000):
            made = tmp_path / str(number)
            with locked_blocking(made):
                made.rename(mark)
                mark.unlink()
    assert seen and not any(seen)


def test_a_guest_that_is_handed_out_is_not_swept(tmp_path: Path) -> None:
    host = Runtime(Store(tmp_path / "store"), tmp_path / "run")
    host.run.mkdir()
    guest = RunDirectory(host.run / "web")
    seen: list[bool] = []

    def look() -> None:
        # Its folder comes and goes meanwhile.
        seen.extend(guest.abandoned for _ in range(50))

    with host.store.hold([], "web", {}), beside(host.sweep), beside(look):
        for _ in range(300):
            with host.locked():
                shutil.rmtree(guest.path, ignore_errors=True)
            with host.batch() as batch:
                batch.add(guest.path)
                batch.hand_out()
            assert guest.path.is_dir()
    assert seen and not any(seen)
