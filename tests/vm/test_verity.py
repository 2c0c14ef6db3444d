"""fs-verity in a guest, whose kernel supports it, on an ext4 file system.

Few test hosts have a file system with fs-verity. The guest runs linux/verity.py unchanged, which
needs only Python. The tests cover a store's use of a blob, and guests that map a changed blob.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

import onecopy
from onecopy import linux
from onecopy.linux import verity
from onecopy.store import Artifact
from tests.conftest import cannot_run
from tests.vm.conftest import Boot, RunIn

FILL = b"onecopy verity test page"
#: Runs in the guest; prints a JSON document of what it saw.
INSIDE = r"""
import ctypes, errno, json, mmap, os, signal, subprocess, sys
from pathlib import Path
sys.path.insert(0, "/tmp/verity")
from onecopy.linux import verity

def run(*argv):
    subprocess.run(argv, check=True)

def number(what):
    try:
        what()
    except OSError as error:
        return error.errno

def read_mapped():
    # In a child: the signal ends it.
    child = os.fork()
    if not child:
        with open("/mnt/blob", "rb") as file:
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[8192]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

run("modprobe", "loop")
run("modprobe", "ext4")
os.makedirs("/mnt", exist_ok=True)
run("mount", "-t", "ext4", "-o", "loop", "/tmp/verity/image", "/mnt")
blob, seen = Path("/mnt/blob"), {}
fill = sys.argv[1].encode()
with blob.open("wb") as file:
    for page in range(16):
        file.write((b"%d " % page + fill).ljust(4096, b"x"))
    file.truncate(1 << 20)
blob.chmod(0o444)
before = blob.read_bytes()
seen["before"] = verity.is_enabled(blob)
seen["protect"] = verity.enable(blob)
seen["protected"] = verity.is_enabled(blob)
seen["again"] = verity.enable(blob)
seen["mode"] = blob.stat().st_mode & 0o777
seen["same"] = blob.read_bytes() == before
seen["write"] = number(lambda: os.open(blob, os.O_RDWR))
Path("/mnt/link").hardlink_to(blob)
with open("/mnt/link", "rb") as file:
    private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    private[0:4] = b"mine"
    seen["private"] = private[0:4] == b"mine" and blob.read_bytes() == before
    private.close()
blob.rename("/mnt/other")
Path("/mnt/other").rename(blob)
elsewhere = Path("/tmp/verity/inside.py")
seen["tmpfs"] = [verity.enable(elsewhere), bool(verity.is_enabled(elsewhere))]
run("umount", "/mnt")
image = Path("/tmp/verity/image")
data = image.read_bytes()
at = data.index(b"2 " + fill)
with image.open("r+b") as file:
    file.seek(at + 100)
    file.write(b"changed behind our back")
run("mount", "-t", "ext4", "-o", "loop", image, "/mnt")
with blob.open("rb") as file:
    seen["good page"] = os.pread(file.fileno(), 4096, 0) == before[:4096]
    seen["bad page"] = number(lambda: os.pread(file.fileno(), 4096, 8192))
seen["mapped"] = read_mapped()
seen["removed"] = number(lambda: (blob.unlink(), Path("/mnt/link").unlink()))
print(json.dumps(seen))
"""


@pytest.fixture
def parcel(tmp_path: Path) -> bytes:
    """What the guest gets: an empty ext4 that can have it, verity.py, and the script."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    made = subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-O", "verity", "-b", "4096", image],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        cannot_run(f"mke2fs cannot make a file system with fs-verity: {made.stderr}")
    (tmp_path / "inside.py").write_text(INSIDE)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path in (image, tmp_path / "inside.py"):
            tar.add(path, path.name)
        for module in (onecopy, linux, verity):
            source = Path(str(module.__file__))
            tar.add(source, source.relative_to(Path(str(onecopy.__file__)).parents[1]))
    return out.getvalue()


def test_in_a_guest(parcel: bytes, python_root: Artifact, boot: Boot, run_in: RunIn) -> None:
    guest = boot(python_root, memory=256 << 20)
    unpack = "mkdir /tmp/verity && tar -xzf - -C /tmp/verity"
    done = run_in(guest, "sh", "-c", unpack, stdin=parcel)
    assert done.exit_code == 0, done.stderr
    done = run_in(guest, "python3", "/tmp/verity/inside.py", FILL.decode())
    assert done.exit_code == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen == {
        "before": False,
        "protect": True,
        "protected": True,
        "again": True,
        "mode": 0o444,
        "same": True,
        "write": 1,  # EPERM
        "private": True,
        "tmpfs": [False, False],
        "good page": True,
        "bad page": 5,  # EIO
        "mapped": -7,  # SIGBUS
        "removed": None,
    }
