"""The root, /dev and the agent of a guest, as programs expect them of a machine with a disk.

One guest is booted, used, saved, and cloned with more memory. Not here: what is read from a segment
(test_sharing.py), a disk that stays (test_fit.py), systemd (test_exec.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onecopy.errors import AgentFailed
from onecopy.guest.exec import Completed, run_captured
from onecopy.guest.exec_streams import KEPT
from onecopy.guest.lifecycle.save import save_guest
from onecopy.guest.lifecycle.start import start_one
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.vm.guests import boot_plan, clone_plan

#: Changes files and folders of the image in the folder argv[1]; prints what came of it as JSON.
CHANGE = """
import ctypes, fcntl, json, os, sys
base = sys.argv[1]
def listed(path):
    folder, name = os.path.split(path)
    return next(each.inode() for each in os.scandir(folder) if each.name == name)
def identity(path):
    found = os.stat(path)
    return [found.st_dev, found.st_ino, listed(path)]
linked = "/usr/bin/perl"
links = [p.path for p in os.scandir("/usr/bin") if p.is_file(follow_symlinks=False)
         and p.inode() == os.stat(linked).st_ino]
before = identity(linked)
os.chmod(linked, 0o700)
chowned = identity(linked)
held, watch = open(base + "/this.py"), ctypes.CDLL(None).inotify_init1(os.O_NONBLOCK)
fcntl.flock(held, fcntl.LOCK_EX)
ctypes.CDLL(None).inotify_add_watch(watch, (base + "/this.py").encode(), 2)
first = identity(base + "/this.py")
with open(base + "/this.py", "r+") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = False
    except BlockingIOError:
        locked = True
    file.write("#!")
events = len(os.read(watch, 4096)) // 16
with open(linked, "ab") as file:
    file.write(b"more")
os.rename(base + "/wsgiref", base + "/wsgiref2")
os.rename(base + "/wsgiref2", "/srv/wsgiref")
unnamed = os.open("/srv", os.O_TMPFILE | os.O_RDWR)
os.link(f"/proc/self/fd/{unnamed}", "/srv/named", src_dir_fd=os.open("/", 0))
os.setxattr("/srv/named", "user.a", b"b")
print(json.dumps({
    "links": sorted(links),
    "identities": [before, chowned, identity(linked)],
    "others": [first, identity(base + "/this.py")],
    "root": os.stat("/").st_dev,
    "locked": locked, "events": events, "moved": sorted(os.listdir("/srv/wsgiref")),
    "reread": (held.seek(0), held.read(2))[1],
}))
"""
#: What all of that has in common before and after a save.
LOOK = """
import json, os
def look(path):
    found = os.stat(path)
    return [found.st_dev, found.st_ino, found.st_nlink, found.st_size, oct(found.st_mode)]
import glob
paths = [*sorted(glob.glob("/usr/bin/perl5.*[0-9]")), "/usr/bin/perl", "/srv/wsgiref", "/srv/named"]
print(json.dumps([look(path) for path in paths]))
"""
HOG = "x = []\nwhile True: x.append(bytearray(b'x' * (1 << 20)))"
NEEDED = """
    cd /tmp && [ "$(stat -c %a . /dev/shm /run/lock | xargs)" = '1777 1777 1777' ] &&
    mountpoint -q /dev/mqueue && mountpoint -q /dev/pts && mountpoint -q /sys/fs/cgroup &&
    [ -e /var/run/lock ] && cat /etc/mtab >/dev/null && echo x | cat /dev/fd/0
"""
STATE = "cat /proc/$(pidof identity)/oom_score_adj; echo $(pidof keeper | wc -w) $(pidof identity)"

Run = Callable[..., Completed]


@pytest.fixture(scope="module")
def guest(host: Runtime, python_root: Artifact) -> Iterator[GuestRecord]:
    """A guest of 256 MiB whose command wrote to /dev/stdout as another user."""
    command = "setpriv --reuid 65534 --clear-groups sh -c 'echo from the command >/dev/stdout'"
    plan = boot_plan(
        host,
        python_root.ref,
        memory=256 * MIB,
        command=f"{command}; echo here >/srv/mark; sleep 1000000",
        ready="[ -e /srv/mark ]",
    )
    record = asyncio.run(start_one(host, plan, "disk"))
    yield record
    host.end(record)


@pytest.fixture(scope="module")
def run(host: Runtime, guest: GuestRecord) -> Run:
    """``run(*argv, name="disk")`` runs a program in a guest."""

    def run_it(*argv: str, name: str = "disk", stdin: bytes | None = None) -> Completed:
        running = run_captured(host.run / name, argv, stdin=stdin, timeout=120, limit=KEPT)
        return asyncio.run(running)

    return run_it


@pytest.fixture(scope="module")
def changed(run: Run) -> Any:
    """What CHANGE said in the guest."""
    done = run("sh", "-c", 'python3 -c "$0" /usr/lib/python3*/', CHANGE)
    assert done.exit_code == 0, done
    return json.loads(done.stdout)


def _free(run: Run, name: str = "disk") -> int:
    """Bytes that df promises on the root."""
    done = run("sh", "-c", "df -k / | awk 'END {print $4}'", name=name)
    return int(done.text) << 10


def test_a_written_file_stays_the_same_file(changed: Any) -> None:
    assert len(changed["links"]) == 2
    for same in changed["identities"], changed["others"]:
        device, number, listed = same[0]
        assert all(each == same[0] for each in same)
        assert device == changed["root"]
        assert number == listed
    assert changed["locked"]
    assert changed["events"] >= 1
    assert changed["reread"] == "#!"


def test_folders_of_the_image_can_be_renamed(changed: Any) -> None:
    assert "simple_server.py" in changed["moved"]


def test_an_overlay_over_the_root(run: Run) -> None:
    layers = "lowerdir=/usr,upperdir=/dev/shm/upper,workdir=/dev/shm/work"
    script = f"""
        mkdir /dev/shm/upper /dev/shm/work && mount -t overlay -o {layers} overlay /mnt &&
        rm -r /mnt/share && mv /mnt/sbin /mnt/other && ls /mnt; umount /mnt; rm -r /dev/shm/*
    """
    done = run("sh", "-c", script)
    assert "other" in done.text.split() and "share" not in done.text.split(), done


def test_hard_links_hold(changed: Any, run: Run) -> None:
    done = run("python3", "-c", LOOK)
    assert done.exit_code == 0, done
    other, perl, *_ = json.loads(done.stdout)
    assert perl == other
    assert perl[2] == 2
    done = run("sh", "-c", f"tail -c 4 {changed['links'][1]}")
    assert done.stdout == b"more"


def test_what_programs_expect_is_there(run: Run) -> None:
    done = run("sh", "-xc", NEEDED)
    assert (done.exit_code, done.stdout) == (0, b"x\n"), done.stderr.decode()


def test_each_program_can_open_its_streams(host: Runtime, guest: GuestRecord, run: Run) -> None:
    script = "cat /dev/stdin >/dev/stdout; echo wrong >/dev/stderr; exit 5"
    done = run("sh", "-c", script, stdin=b"in")
    assert (done.exit_code, done.stdout, done.stderr) == (5, b"in", b"wrong\n")
    assert b"from the command" in (host.run / guest.name / "console.log").read_bytes()


def test_the_agent_comes_back(run: Run) -> None:
    before = run("sh", "-c", STATE).text.split()
    assert before[:2] == ["-1000", "2"]
    # In the background, since the agent is killed, then the keeper, so that its twin comes. What
    # starts it has ended by then.
    script = """
        while pidof exec >/dev/null; do sleep .2; done
        sleep 3; kill -9 $(pidof ld.so); sleep 4; kill -9 $(pidof identity); sleep 4
        for keeper in $(pidof keeper); do
            read -r _ _ _ parent _ </proc/$keeper/stat; [ $parent != 1 ] || kill -9 $keeper
        done
        sleep 6; touch /srv/killed
    """
    run("setsid", "sh", "-c", f"({script}) >/dev/null 2>&1 </dev/null &")
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(AgentFailed):  # it is being killed
            if run("test", "-e", "/srv/killed").exit_code == 0:
                break
        assert time.monotonic() < deadline, "what kills the agent never came to its end"
        time.sleep(1)
    after = run("sh", "-c", STATE).text.split()
    assert after[:2] == ["-1000", "2"]
    assert after[2] != before[2]


def test_memory_and_processes_that_run_out_are_the_programs_own(run: Run) -> None:
    identity = run("pidof", "identity").text
    assert run("python3", "-c", HOG).exit_code == 137
    assert b"Killed process" in run("dmesg").stdout
    # Its limit leaves some for the agent, which starts one more when all others are taken.
    group = "/sys/fs/cgroup/onecopy-guest/exec"
    most = int(run("cat", f"{group}/pids.max").text)
    assert most < int(run("cat", "/proc/sys/kernel/threads-max").text)
    run("sh", "-c", f"echo 40 >{group}/pids.max")
    bomb = "while :; do sleep 1000 & done"
    run("setsid", "sh", "-c", f"setsid sh -c '{bomb}' >/dev/null 2>&1 </dev/null &")
    full = f"read -r n <{group}/pids.current; [ $n -ge 40 ]"
    assert any(run("sh", "-c", full).exit_code == 0 for _ in range(30))
    assert run("sh", "-c", f"echo 1 >{group}/cgroup.kill").exit_code == 137
    run("sh", "-c", f"echo {most} >{group}/pids.max")
    assert run("pidof", "identity").text == identity


def test_a_full_root_is_a_full_disk(run: Run) -> None:
    promised = _free(run)
    assert promised > 96 * MIB
    script = """
        dd if=/dev/zero of=/fill bs=256k 2>&1; dd if=/dev/zero of=/dev/shm/fill bs=256k 2>&1
        dd if=/dev/zero of=/run/fill bs=256k 2>&1; dd if=/dev/zero of=/dev/fill bs=256k 2>&1
        stat -c %s /fill
    """
    done = run("sh", "-c", script)
    assert done.text.count("No space left on device") == 4
    written = int(done.text.split()[-1])
    assert promised - MIB < written <= promised
    # The agent and a program of some size go on.
    done = run("python3", "-c", "import ssl, json; print(len(bytearray(b'x' * (16 << 20))))")
    assert done.text == f"{16 << 20}\n"
    # One program was killed for memory in the test before, and none here.
    assert run("dmesg").text.count("Killed process") == 1
    run("rm", "/fill", "/dev/shm/fill", "/run/fill", "/dev/fill")
    assert _free(run) > promised - MIB


def test_a_clone_has_all_of_it(host: Runtime, guest: GuestRecord, changed: Any, run: Run) -> None:
    before, free = json.loads(run("python3", "-c", LOOK).stdout), _free(run)
    saved = asyncio.run(save_guest(host, Reference("disk"), guest.name)).artifact
    plan = clone_plan(host, saved, memory=512 * MIB)
    clone = asyncio.run(start_one(host, plan, "disk2"))
    try:
        assert json.loads(run("python3", "-c", LOOK, name="disk2").stdout) == before
        # Its root has grown with its memory, by the same share.
        grown = _free(run, "disk2") - free
        assert 256 * MIB * 5 // 8 - 8 * MIB < grown <= 256 * MIB * 5 // 8
        fill = "dd if=/dev/zero of=/fill bs=256k; stat -c %s /fill; rm /fill"
        done = run("sh", "-c", fill, name="disk2")
        assert b"No space left on device" in done.stderr
        assert int(done.text) > free + grown - 2 * MIB
        assert _free(run, "disk2") > free + grown - 2 * MIB
        done = run("sh", "-c", "mv /srv/wsgiref /srv/again; ls /srv/again", name="disk2")
        assert "simple_server.py" in done.text
    finally:
        host.end(clone)
        host.store.remove(Reference("disk"))
