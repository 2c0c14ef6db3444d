"""What the store's tests share: small artifacts, children that are killed, and a second opinion.

`check_whole` reads the disk with json and hashlib alone, so the store cannot vouch for itself.
"""

import hashlib
import json
import os
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import onecopy
from onecopy.model import Reference
from onecopy.store import Artifact, NewLayer, Store

PMEM = "application/vnd.onecopy.test.v1"
_PACKAGE = str(Path(onecopy.__file__).parent)


def put(
    store: Store,
    ref: str = "app:1",
    content: bytes = b"content",
    *,
    kind: str = "segment",
    reuse: Iterable[str] = (),
    replace: bool = True,
) -> Artifact:
    """Put an artifact of one new layer and the stored blobs ``reuse``."""
    with store.workspace() as work:
        file = work / "layer"
        file.write_bytes(content)
        layers = [NewLayer(file, PMEM, {"org.onecopy.role": "image"})]
        layers += [NewLayer(None, PMEM, digest=digest) for digest in reuse]
        return store.put(kind, Reference.parse(ref), b'{"a":1}', layers, replace=replace)


def digest_of(content: bytes) -> str:
    """``sha256:HEX``."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def blobs(root: Path) -> set[str]:
    """The digests of all blob files."""
    return {f"sha256:{path.name}" for path in (root / "blobs" / "sha256").iterdir()}


def check_whole(root: Path, pending: Iterable[str] = ()) -> dict[str, str]:
    """Assert that the store is whole with nothing left over; return its names and digests.

    ``pending`` are digests that may be there only because they are leased.
    """
    index = json.loads((root / "index.json").read_bytes())
    wanted = set(pending)
    for entry in index["manifests"]:
        manifest = json.loads(_blob(root, entry["digest"]).read_bytes())
        wanted |= {entry["digest"], manifest["config"]["digest"]}
        wanted |= {layer["digest"] for layer in manifest["layers"]}
    assert blobs(root) == wanted
    for digest in wanted:
        assert digest_of(_blob(root, digest).read_bytes()) == digest
        assert _blob(root, digest).stat().st_mode & 0o777 == 0o444
    assert sorted(root.glob("tmp/**/*")) == []
    return {
        entry["annotations"]["org.opencontainers.image.ref.name"]: entry["digest"]
        for entry in index["manifests"]
    }


def _blob(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest.removeprefix("sha256:")


def fork(function: Callable[[], object]) -> int:
    """Run ``function`` in a child process; its pid. Status 0 means that it returned."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def killed_at(step: int, function: Callable[[], object]) -> bool:
    """Run ``function`` in a child that is killed -9 before onecopy's line number ``step``.

    Lines are counted as they are executed. False if the child ended before that.
    """

    def run() -> None:
        left = step

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.startswith(_PACKAGE):
                return None
            if event == "line":
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        function()

    _, status = os.waitpid(fork(run), 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0
    return False


def kills(make: Callable[[], Path], change: Callable[[], object]) -> Iterator[Path]:
    """Kill ``change`` at each state of the store that it passes through; the store after each.

    ``make`` gives a fresh store, in a place that is the same each time. A killed process leaves
    what is on disk: so it is killed before each line of onecopy before which the disk has changed,
    and before the first. The last round is not killed.
    """
    # What this process finds out once, and then remembers, is lines that no later round has.
    make()
    change()
    steps = _steps_that_change(make(), change)
    assert len(steps) > 3, "nothing to see"
    for step in (1, *steps):
        root = make()
        assert killed_at(step, change), (step, steps)
        yield root
    root = make()
    assert os.waitpid(fork(change), 0)[1] == 0
    yield root


def _steps_that_change(root: Path, change: Callable[[], object]) -> list[int]:
    """The numbers of lines, as `killed_at` counts them, before which the disk has changed."""
    reading, writing = os.pipe()

    def run() -> None:
        steps, number, before = [], 0, _on_disk(root)

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal number, before
            if not frame.f_code.co_filename.startswith(_PACKAGE):
                return None
            if event == "line":
                number += 1
                now = _on_disk(root)
                if now != before:
                    steps.append(number)
                before = now
            return trace

        sys.settrace(trace)
        change()
        sys.settrace(None)
        os.write(writing, json.dumps(steps).encode())

    child = fork(run)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    found: list[int] = json.loads(told)
    return found


def _on_disk(root: Path) -> list[tuple[str, int, int, bytes]]:
    """All that is in a folder: path, mode, links and content."""
    found = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = f"{folder}/{name}"
            status = os.lstat(path)
            content = b""
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:  # noqa: PTH123 - it is called at each line
                    content = file.read()
            found.append((path, status.st_mode, status.st_nlink, content))
    return found
