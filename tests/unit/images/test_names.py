"""The script that makes names resolve in an image, run by a real busybox over /etc folders.

Not here: that they do resolve, and what clones make of it (vm/test_names.py).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from onecopy.images.initramfs import resource
from tests.conftest import cannot_run

OURS = "127.0.1.1\tweb-1\t# onecopy\n"
LOCAL = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
DEBIAN = "127.0.0.1\tlocalhost\n127.0.1.1\tbox.example.org\tbox\n\n# IPv6\n::1     localhost\n"


def names(root: Path, name: str = "web-1") -> str:
    """Run it for ``name``; what it says."""
    busybox = shutil.which("busybox")
    if not busybox:
        cannot_run("there is no busybox")
    script = root.with_suffix(".sh")
    script.write_bytes(resource("names"))
    argv: list[str | Path] = [busybox, "sh", str(script), name, str(root)]
    done = subprocess.run(
        argv,
        env={"b": busybox},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )

    return str(done.stdout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    (made / "etc").mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    ("hostname", "hosts", "wanted"),
    [
        # None, or next to none.
        (None, None, LOCAL + OURS),
        ("box", "", LOCAL + OURS),
        (None, "# nothing\n", "# nothing\n" + LOCAL + OURS),
        # With a last line that does not end.
        (None, "127.0.0.1 localhost", "127.0.0.1 localhost\n" + OURS),
        # IPv6 is as it was.
        (None, "127.0.0.1 localhost\n", "127.0.0.1 localhost\n" + OURS),
        # The old machine goes, its domain stays.
        (
            "box",
            DEBIAN,
            "127.0.0.1\tlocalhost\n\n# IPv6\n::1     localhost\n"
            "127.0.1.1\tweb-1.example.org web-1\t# onecopy\n",
        ),
        (
            "box.example.org",
            "127.0.0.1 localhost box\n",
            "127.0.0.1\tlocalhost\n127.0.1.1\tweb-1.example.org web-1\t# onecopy\n",
        ),
        # A container's.
        ("3f2a1b", "127.0.0.1 localhost\n172.17.0.2 3f2a1b\n", "127.0.0.1 localhost\n" + OURS),
        # Others stay, comments too; a name that begins in the same way is another one.
        (
            "box",
            "127.0.0.1 localhost\n10.0.0.5 boxes db box # two\n10.0.0.6  box2 # x\n",
            "127.0.0.1 localhost\n10.0.0.5\tboxes db\n10.0.0.6  box2 # x\n" + OURS,
        ),
        # localhost is no machine's own name.
        ("localhost", "127.0.0.1 localhost\n", "127.0.0.1 localhost\n" + OURS),
        # Who names this guest knows better.
        (
            "box",
            "127.0.0.1 localhost\n10.0.0.7 web-1\n10.0.0.8 web-2\n",
            "127.0.0.1 localhost\n10.0.0.7 web-1\n10.0.0.8 web-2\n",
        ),
        # A guest's own file that came to be an image again.
        ("box", LOCAL + "127.0.1.1\tbox\t# onecopy\n10.0.0.9 x\n", LOCAL + "10.0.0.9 x\n" + OURS),
    ],
)
def test_hosts(root: Path, hostname: str | None, hosts: str | None, wanted: str) -> None:
    etc = root / "etc"
    if hostname is not None:
        (etc / "hostname").write_text(f"# the name\n{hostname}\n")
    if hosts is not None:
        (etc / "hosts").write_text(hosts)
    assert names(root) == ""
    assert (etc / "hosts").read_text() == wanted
    assert (etc / "hostname").read_text() == "web-1\n"
    assert (etc / "nsswitch.conf").read_text() == "hosts: files dns\n"
    before = {path: path.stat().st_mtime_ns for path in etc.iterdir()}
    assert names(root) == ""
    assert {path: path.stat().st_mtime_ns for path in etc.iterdir()} == before


def test_an_image_without_etc(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert names(root) == ""
    assert (root / "etc/hosts").read_text() == LOCAL + OURS
    assert not (root / "etc/hostname").exists()


def test_odd_images(root: Path) -> None:
    # Another's settings stay, links are followed, folders told.
    (root / "etc/nsswitch.conf").symlink_to("missing")
    (root / "other").write_text("box\n")
    (root / "etc/hostname").symlink_to("../other")
    (root / "etc/hosts").mkdir()
    assert "/etc/hosts cannot be written" in names(root)
    assert (root / "other").read_text() == "web-1\n"
    assert not (root / "etc/nsswitch.conf").exists()
    shutil.rmtree(root / "etc")
    (root / "etc").touch()
    assert names(root) == ""
