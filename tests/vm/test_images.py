"""Any image boots: the disk of another machine with services, a minimal init, and no Linux.

Not here: which disk images can be a source (tests/unit/images/test_disk.py).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecopy.guest.observe.accounts import guest_maps
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import MIB, Reference
from onecopy.sharing import report
from onecopy.store import Artifact
from tests.command import onecopy
from tests.vm.conftest import Boot, RunIn
from tests.vm.guests import Guests
from tests.vm.kept import MEMTEST

#: As Debian's installer and its cloud images have it: of disks that a guest has not.
FSTAB = """\
# /etc/fstab: static file system information.
UUID=3f1b1c7c-0c7b-4f8b-9a2b-7c2b3c4d5e6f / ext4 errors=remount-ro 0 1
UUID=4A2B-1C3D /boot/efi vfat umask=0077 0 1
PARTUUID=8a7b6c5d-02 /home ext4 defaults 0 2
/dev/disk/by-label/swap none swap sw 0 0
/swapfile none swap sw 0 0
tmpfs /srv/scratch tmpfs size=1m,nosuid 0 0
"""
#: A table with a partition for EFI, and a root.
TABLE = "label: gpt\nsize=2M, type=U\nsize={size}M, type=L\n"
#: The state of systemd and of five units, what failed, and the journal of this boot.
LOOK = """
systemctl is-system-running
systemctl is-active multi-user.target ssh cron dbus systemd-journald
systemctl --failed --plain --no-legend
logger here is $(hostname)
journalctl --sync
journalctl -b -o cat -t root
"""
#: Runs with mounts of its own.
OWN_MOUNTS = ("unshare", "--mount", "--propagation=private", "sh", "-ec")

Restart = Callable[[GuestRecord], list[GuestRecord]]


@pytest.fixture
def restart(host: Runtime, guests: Guests) -> Iterator[Restart]:
    """``restart(guest)`` saves a running guest and starts two clones; they end after the test."""

    def start(guest: GuestRecord) -> list[GuestRecord]:
        saved = guests.save(guest, "again").artifact
        ports = [(0, port) for _, port in guest.publish]
        return [each.record for each in guests.clone(saved, 2, name="again", publish=ports)]

    yield start
    guests.end()
    if host.store.find(Reference("again"), "system"):
        host.store.remove(Reference("again"))


@pytest.fixture
def disk(services_root: Artifact, tmp_path: Path) -> Path:
    """The disk of a machine with Debian 13: GPT, EFI partition, ext4, fstab, in qcow2."""
    segment = services_root.layer("image").path
    raw, root, image = (tmp_path / name for name in ("raw", "root", "disk.qcow2"))
    size = segment.stat().st_size // MIB * 3 // 2
    for path, length in ((root, size), (raw, size + 8)):
        with path.open("wb") as file:
            file.truncate(length * MIB)
    script = """
        mkdir m erofs && mount -o loop,ro $0 erofs && mke2fs -q -t ext4 $1 && mount -o loop $1 m
        cp -a erofs/. m && printf %s "$2" >m/etc/fstab && mkdir -p m/srv/scratch m/boot/efi
        echo 'swap UUID=1234 /dev/urandom swap' >m/etc/crypttab
    """
    argv = [*OWN_MOUNTS, script, str(segment), str(root), FSTAB]
    subprocess.run(argv, cwd=tmp_path, check=True)
    table = TABLE.format(size=size)
    subprocess.run(["sfdisk", "-q", raw], input=table, text=True, check=True)
    start = ["partx", "-g", "-r", "-o", "START", "-n", "2", str(raw)]
    seek = int(subprocess.run(start, capture_output=True, check=True).stdout)
    copy = ["dd", f"if={root}", f"of={raw}", f"seek={seek // 8}", "bs=4K", "conv=notrunc,sparse"]
    subprocess.run([*copy, "status=none"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    return image


def greeting(guest: GuestRecord) -> bytes:
    """What the guest's SSH server says."""
    port = guest.publish[0][0]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        return connection.recv(64)


def test_a_debian_13_from_the_disk_of_a_machine(
    host: Runtime, disk: Path, boot: Boot, run_in: RunIn, restart: Restart
) -> None:
    def said(guest: GuestRecord, *argv: str) -> str:
        return run_in(guest, *argv).stdout.decode().strip()

    def require_whole(guest: GuestRecord) -> None:
        lines = said(guest, "sh", "-c", LOOK).splitlines()
        assert lines[:6] == ["running", *["active"] * 5], lines
        assert f"here is {guest.name}" in lines[6:]
        assert greeting(guest).startswith(b"SSH-2.0-OpenSSH")

    root = build_segment(host.store, Reference("from-disk"), f"disk:{disk}")
    guest = boot(root, memory=384 * MIB, publish=((0, 22),))
    require_whole(guest)
    # What fstab says of no disk holds.
    assert said(guest, "stat", "-f", "-c", "%T", "/srv/scratch") == "tmpfs"
    assert said(guest, "grep", "-c", "^[^#]", "/etc/fstab") == "1"
    waited = said(guest, "journalctl", "-b", "-o", "cat", "-g", "Timed out", "_PID=1")
    assert waited in ("", "-- No entries --")
    assert "Linux version" in said(guest, "journalctl", "-b", "-o", "cat", "-k")
    for clone in restart(guest):
        require_whole(clone)
        assert said(clone, "hostname") == clone.name
        number = "/proc/sys/kernel/random/boot_id"
        assert said(clone, "cat", number) == said(guest, "cat", number)


def test_a_minimal_init(host: Runtime, tmp_path: Path, boot: Boot, run_in: RunIn) -> None:
    """busybox's init, by its inittab: mounts what fstab says, and has a program run."""
    for name in ("bin", "sbin", "etc", "mnt", "srv/scratch"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tmp_path / "bin/busybox")
    for name in ("bin/sh", "bin/mount", "sbin/init", "bin/hostname"):
        (tmp_path / name).symlink_to("/bin/busybox")
    (tmp_path / "etc/fstab").write_text(FSTAB + "tmpfs /mnt tmpfs size=1m 0 0\n")
    script = "mount -a && echo $(hostname) >/mnt/mark"
    (tmp_path / "etc/inittab").write_text(f"::sysinit:/bin/sh -c '{script}'\n::respawn:/bin/sh\n")
    root = build_segment(host.store, Reference("inittab"), f"dir:{tmp_path}")
    guest = boot(root, memory=128 * MIB)
    assert run_in(guest, "readlink", "/proc/1/exe").stdout == b"/bin/busybox\n"
    assert run_in(guest, "cat", "/proc/1/comm").stdout == b"init\n"
    wait = "until [ -e /mnt/mark ]; do sleep 0.1; done; cat /mnt/mark"
    assert run_in(guest, "sh", "-c", wait, timeout=60).stdout.decode().strip() == guest.name
    assert b"tmpfs /mnt tmpfs" in run_in(guest, "cat", "/proc/mounts").stdout


@pytest.fixture
def memtest(host: Runtime) -> Artifact:
    """A kernel by itself that is no Linux."""
    return host.store.resolve(MEMTEST, "kernel")


def console(host: Runtime, guest: GuestRecord) -> str:
    return (host.run / guest.name / "console.log").read_text(errors="replace")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)


def test_a_system_that_is_no_linux(
    host: Runtime, memtest: Artifact, boot: Boot, restart: Restart
) -> None:
    """memtest86+ tests memory, is saved in the middle of it, and its clones go on."""
    guest = boot(memtest, memory=128 * MIB)
    assert (guest.agent, guest.attached) == (False, ())
    wait_for(lambda: "Memtest86+" in console(host, guest), "its name")
    # How far it is: first with the whole screen, then now and then.
    wait_for(lambda: console(host, guest).count("Time:") > 2, "its first test")
    for argv in (
        ("exec", guest.name, "true"),
        ("attach", guest.name, "any"),
        ("commit", guest.name, "any"),
        ("boot", memtest.ref, "--", "true"),
    ):
        done = onecopy(*argv, code=None)
        assert "is a bare machine" in done.stderr, argv
        assert done.returncode == (125 if argv[0] == "exec" else 12)
    clones = restart(guest)
    for clone in clones:
        assert (clone.agent, clone.memory) == (False, 128 * MIB)
        wait_for(lambda: "Time:" in console(host, clone), "more")  # noqa: B023 - called at once
        # It goes on where it was, and does not say its name again.
        assert "Memtest86+" not in console(host, clone)
    blob = next(each for each in report.collect(guest_maps(clones)).blobs if each.kind == "ram")
    assert (blob.guests, blob.size) == (2, 128 * MIB)
    done = onecopy("stop", guest.name, *(clone.name for clone in clones))
    assert done.stdout.count("was ended") == 3
