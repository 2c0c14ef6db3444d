"""Everyday ends with a real guest: streams, odd bytes, and what is refused before a boot."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.create import NewRange, create_segment
from onecopy.model import MIB, PageClass, Reference
from onecopy.store import Artifact

_QUARTER = 128 * MIB // 4 * 64


def _onecopy(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which ``onecopy`` is ours."""
    argv = ["bash", "-c", f'onecopy() {{ "{sys.executable}" -m onecopy "$@"; }}; {line}']
    env = {**os.environ, **environment}
    return subprocess.run(argv, env=env, capture_output=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def segments(host: Runtime, busybox_root: Artifact) -> Iterator[None]:
    """Segments without content: one that just fits a guest of 128 MiB, and one that fits none."""
    there = host.store
    own = 512 * MIB
    create_segment(there, Reference("fits"), [NewRange(PageClass.SN, _QUARTER - own)])
    create_segment(there, Reference("huge"), [NewRange(PageClass.SN, 20 << 30)])
    yield
    for name in ("fits", "huge"):
        there.remove(Reference(name), in_use=True)


@pytest.fixture(scope="module")
def guest(
    host: Runtime, busybox_root: Artifact, segments: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestRecord]:
    """A guest that has as much to describe as it may."""
    line = "onecopy boot --command '' --name ends --memory 128M --segment fits"
    done = _onecopy(f"{line} {busybox_root.ref}")
    assert done.returncode == 0, done.stderr
    (found,) = [each for each in host.guests() if each.name == "ends"]
    yield found
    host.end(found)


@pytest.mark.parametrize(
    ("line", "code", "out", "told"),
    [
        ("onecopy exec ends -- printf '%s' $'a\\xff'", 125, b"", "is not UTF-8"),
        ("onecopy exec ends -- printf '%s' hé", 0, "hé".encode(), ""),
        ("onecopy exec ends -- cat <&-", 0, b"", ""),
        ("onecopy exec -i ends -- cat <&-", 125, b"", "standard input cannot be read"),
        ("onecopy exec ends -- echo x >/dev/full", 125, b"", "No space left on device"),
        ("onecopy exec ends -- yes | head -1; exit ${PIPESTATUS[0]}", 141, b"y\n", ""),
        ("onecopy logs ends | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", None, b"", ""),
        ("onecopy logs ends >/dev/full", 23, b"", "No space left"),
        ("echo x >$'b\\xff'; onecopy cp $'b\\xff' ends:$'/c\\xff'", 2, b"", "is not UTF-8"),
        ("onecopy cp ends:$'/c\\xff' d", 2, b"", "is not UTF-8"),
        ("mkdir e; echo x >e/$'f\\xff'; onecopy cp e ends:/e && onecopy cp ends:/e g", 0, b"", ""),
        ("cat g/$'f\\xff'; onecopy cp ends:/e/. $'h\\xff' && ls $'h\\xff'", 0, b"x\nf\xff\n", ""),
        ("onecopy cp $'b\\xff' ends:/e", 12, b"", "not a valid Unicode character"),
        ("mkdir gone; cd gone; rmdir ../gone; onecopy exec ends -- echo x", 0, b"x\n", ""),
        ("ulimit -n 20; onecopy exec ends -- echo x", 0, b"x\n", ""),
        ("onecopy attach ends huge", 19, b"", "346.0 MiB of RAM for their page structures"),
    ],
)
def test_a_guest_is_used(
    guest: GuestRecord, tmp_path: Path, line: str, code: int | None, out: bytes, told: str
) -> None:
    where = tmp_path.parent / "shared"
    where.mkdir(exist_ok=True)
    done = _onecopy(f"cd {where}; {line}")
    assert (done.returncode, done.stdout) == (done.returncode if code is None else code, out), done
    assert code is not None or done.returncode in (0, 141)
    assert told in done.stderr.decode()
    assert bool(told) == bool(done.stderr)
    assert b"Traceback" not in done.stderr


def test_what_the_guest_describes_leaves_it_room(guest: GuestRecord) -> None:
    done = _onecopy("onecopy exec ends -- grep MemAvailable /proc/meminfo")
    assert int(done.stdout.split()[1]) > 20 << 10


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("boot {root}", 2, "has no init (/sbin/init)"),
        ("save x --root {root}", 2, "give a command with --command CMD"),
        ("save {root} --root {root} --command ''", 5, "is a segment"),
        ("boot --command '' --segment huge --memory 256M {root}", 19, "--memory 1408M or more"),
        ("save x --root {root} --command '' --segment huge", 19, "64.0 MiB"),
        ("run --segment huge {system}", 19, "page structures"),
        ("run {root}", 3, "`onecopy boot {root}` boots it"),
        ("boot {system}", 3, "`onecopy run {system}` starts"),
        ("stop nobody ends-too", 3, "no guest 'ends-too'"),
        ("rm nobody:1 nobody:2", 3, "nobody:2"),
    ],
)
def test_what_cannot_be_is_refused_before_it_boots(
    host: Runtime,
    busybox_root: Artifact,
    saved: Artifact,
    segments: None,
    line: str,
    code: int,
    told: str,
) -> None:
    words = {"root": busybox_root.ref, "system": saved.ref}
    done = _onecopy(f"onecopy {line.format(**words)}")
    said = done.stderr.decode()
    assert (done.returncode, told.format(**words) in said) == (code, True), said
    assert "booting" not in said
    assert done.stdout == b""


def test_a_command_for_an_image_without_init(busybox_root: Artifact) -> None:
    done = _onecopy(f"onecopy boot --memory 128M {busybox_root.ref} -- echo hello")
    assert (done.returncode, done.stdout) == (0, b"hello\n"), done.stderr
