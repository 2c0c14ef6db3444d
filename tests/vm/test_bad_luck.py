"""Failures: full disks, killed commands, killed QEMUs, guests that never come up.

After each the next command finds no leftovers and an intact store. Not here: crash tests of the
store, line by line (tests/unit/store/test_crash.py).
"""

from __future__ import annotations

import gzip
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from onecopy import errors
from onecopy.errors import AgentFailed, InUse, OnecopyError
from onecopy.guest import ports
from onecopy.guest.runtime import Runtime
from onecopy.images.kernel import ensure_kernel
from onecopy.images.tools import ensure_tools
from onecopy.linux.vmm_registry import of_store as vmms_on_record
from onecopy.model import MIB, Reference
from onecopy.store import Artifact, NewLayer
from onecopy.vmm.agent import Agent
from tests.command import ONECOPY, answer, onecopy, refused
from tests.unit.store_kit import check_whole
from tests.vm.conftest import ACCEL, vmms
from tests.vm.guests import Guests
from tests.vm.kept import copy_artifact

DOCUMENTED = {
    each.exit_code
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, OnecopyError) and each is not OnecopyError
}
#: Seconds after which something that must not block has blocked.
STUCK = 120


def refs(host: Runtime) -> set[str]:
    return {artifact.ref for artifact in host.store.artifacts()}


def assert_nothing_left(host: Runtime, names: set[str]) -> None:
    """After one next command, only ``names`` are in the store, and nothing is anywhere else."""
    assert answer("ps", "--json", home=host.store.root) == []
    assert vmms(host) == []
    left = [path.name for path in host.run.iterdir() if not path.name.endswith("lock")]
    assert left == [".store"]
    assert vmms_on_record(host.run.name) == []
    assert list((host.store.root / "leases").iterdir()) == []
    assert list((host.store.root / "tmp").iterdir()) == []
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    assert [line for line in mounts if f"{host.store.root}/" in line.split()[4]] == []
    assert refs(host) == names
    assert host.store.collect() == []


@pytest.fixture(autouse=True)
def _nothing_left(host: Runtime, saved: Artifact, busybox_root: Artifact) -> Iterator[None]:
    """Each test of this file leaves nothing, and no name, behind."""
    names = refs(host)
    # What other files' tests let end by itself stays known.
    host.forget(*(record.name for record in host.ended()))
    yield
    assert_nothing_left(host, names)


def save(name: str, root: Artifact, *options: str) -> list[str]:
    return ["save", name, "--root", root.ref, "--memory", "128M", "--command", "", *options]


def test_a_guest_that_never_becomes_ready(busybox_root: Artifact) -> None:
    options = ["--ready", "echo not yet; exit 3", "--timeout", "20"]
    said = refused(11, *save("never", busybox_root, *options))
    assert "not ready after 20 s" in said and "exit code 3: not yet" in said
    assert "correct --ready" in said


def test_an_agent_that_stops_answering(
    guests: Guests, busybox_root: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would be a minute.
    monkeypatch.setattr(Agent.call, "__kwdefaults__", {"timeout": 5.0})
    stop = "grep -q 'qemu-g[a]' $p/cmdline && kill -STOP ${p##*/}"
    # Long enough to boot, here and now.
    took = guests.boot(busybox_root, memory="128M").record.start_seconds
    ready = f"echo last words >/dev/ttyS0; for p in /proc/[0-9]*; do {stop}; done; sleep 999"
    with pytest.raises(AgentFailed, match="did not answer") as caught:
        guests.boot(busybox_root, memory="128M", ready=ready, timeout=3 * took + 10)
    assert "last words" in caught.value.message


def test_a_guest_that_cannot_boot_in_time(busybox_root: Artifact) -> None:
    said = refused(11, *save("late", busybox_root, "--timeout", "1"))
    assert "did not come up within 1 s" in said and "--timeout" in said
    boot = ["boot", "--name", "late", "--memory", "128M", "--command", "", "--timeout", "1"]
    refused(11, *boot, busybox_root.ref)


def test_a_guest_whose_command_ends(busybox_root: Artifact) -> None:
    said = refused(
        10, *save("short", busybox_root, "--command", "echo bye; exit 5", "--ready", "false")
    )
    # Its own last words, too.
    assert "the guest ended while starting" in said
    assert "bye" in said and "the command ended with exit code 5" in said


@contextmanager
def begun(*args: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, as a shell starts it; ended at the end."""
    with subprocess.Popen(
        [ONECOPY, *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], step: str) -> None:
    """Read the command's progress up to the line of this step."""
    assert process.stderr
    seen = []
    for line in process.stderr:
        seen.append(line)
        if step in line:
            return
    raise AssertionError(f"{step!r} did not come: {seen}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and the rest of what was said."""
    said = process.communicate(timeout=STUCK)[1]
    return process.returncode, said


INTERRUPTS = [
    ("build", "writing the erofs image", signal.SIGINT),
    ("build", "writing the erofs image", signal.SIGKILL),
    ("build", "storing", signal.SIGTERM),
    ("debian", "installing", signal.SIGINT),
    ("debian", "installing", signal.SIGKILL),
    ("save", "booting", signal.SIGINT),
    ("save", "booting", signal.SIGKILL),
    ("save", "freezing", signal.SIGKILL),
    ("save", "storing", signal.SIGTERM),
    ("run", "", signal.SIGINT),
    ("run", "", signal.SIGTERM),
    ("run", "", signal.SIGKILL),
    ("run", "", signal.SIGKILL),
    ("booted", "booting", signal.SIGTERM),
]


@pytest.mark.parametrize(("what", "step", "number"), INTERRUPTS)
def test_an_interrupted_command(
    host: Runtime,
    saved: Artifact,
    busybox_root: Artifact,
    tmp_path: Path,
    what: str,
    step: str,
    number: signal.Signals,
) -> None:
    names = refs(host)
    args = {
        "build": ["build", "cut", "--from", f"dir:{tmp_path}"],
        "debian": ["build", "cut", "--from", "debian:bookworm"],
        "save": save("cut", busybox_root),
        "run": ["run", "-n", "4", "--name", "cut", saved.ref],
        "booted": [
            "boot",
            "--command",
            "",
            "--memory",
            "128M",
            "--name",
            "cut",
            busybox_root.ref,
        ],
    }[what]
    (tmp_path / "data").write_bytes(secrets.token_bytes(64 * MIB))
    # Storing takes longer than this, so that all of it lies before the end.
    longest = {"debian": 8.0, "storing": 0.03}.get(step if step == "storing" else what, 0.3)
    delay = random.uniform(0, longest)  # noqa: S311
    print(f"delay {delay:.3f} s")  # shown if it fails
    with begun(*args) as process:
        if step:
            wait_for(process, step)
        else:
            first_vmm(host, process)
        time.sleep(delay)
        # As Ctrl-C does: to the command and to all that it started in its process group.
        send = os.killpg if number == signal.SIGINT else os.kill
        send(process.pid, number)
        code, said = finish(process)
    assert "Traceback" not in said
    guests, new = answer("ps", "--json"), refs(host) - names
    if code:
        assert code == (-9 if number == signal.SIGKILL else 130), said
    if code == 130:
        assert said.splitlines()[-1] == "onecopy: interrupted"
    if code == 0 or new or (guests and number == signal.SIGKILL):
        # It was done already, but for its exit; then it is all there.
        assert len(guests) == {"run": 4, "booted": 1}.get(what, 0)
        assert new == (set() if what in ("run", "booted") else {"cut:latest"})
        onecopy("stop", "--all", "--now")
        if new:
            onecopy("rm", "cut")
    if what == "debian":
        let_mmdebstrap_end(host)
    assert_nothing_left(host, names)


def let_mmdebstrap_end(host: Runtime) -> None:
    """A kill -9 of us has it asked to end, which takes it some seconds."""
    work = f"{host.store.root}/tmp/work-".encode()
    deadline = time.monotonic() + STUCK
    while any(work in line for line in command_lines()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def command_lines() -> Iterator[bytes]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                yield (entry / "cmdline").read_bytes()


#: The command, interrupted when its guests have just been handed out.
TOO_LATE = """
import os, signal
from onecopy.__main__ import main
from onecopy.guest.run_directory import Batch

hand_out = Batch.hand_out

def and_interrupt(batch):
    hand_out(batch)
    os.kill(os.getpid(), signal.SIGINT)

Batch.hand_out = and_interrupt
main()
"""


def test_interrupted_when_all_run(host: Runtime, saved: Artifact) -> None:
    before = vmms(host)
    argv = [sys.executable, "-c", TOO_LATE, "run", "-n", "2", "--name", "late", saved.name]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (130, ""), done
    assert vmms(host) == before
    assert not [each.name for each in host.guests() if each.name.startswith("late")]


@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_qemu_killed_while_saving(host: Runtime, busybox_root: Artifact, delay: float) -> None:
    with begun(*save("dead", busybox_root, "--ready", "echo soon; false")) as process:
        wait_for(process, "booting")
        kill_first(host, process, delay)
        code, said = finish(process)
    assert code == 10, said
    assert "the guest ended while starting (QEMU's exit code -9)" in said
    assert "QEMU was killed" in said


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.15])
def test_qemu_killed_while_a_clone_starts(host: Runtime, saved: Artifact, delay: float) -> None:
    began = time.monotonic()
    with begun("run", "--name", "dead", saved.ref) as process:
        kill_first(host, process, delay)
        code, said = finish(process)
    # Killed right after it was handed out, the start itself was a success.
    assert code in (0, 10), said
    if code == 10:
        assert "QEMU" in said
    else:
        assert "QEMU was killed" in onecopy("ps", "-a").stdout
        onecopy("rm", "dead")
    # Nobody waits for a guest that is gone.
    assert time.monotonic() - began < 20


def kill_first(host: Runtime, process: subprocess.Popen[str], delay: float) -> None:
    """Wait for the first VMM, and ``delay`` seconds more; kill it, until the command has ended.

    One that is killed while a fork server confines it is started again by exec.
    """
    first_vmm(host, process)
    time.sleep(delay)
    while process.poll() is None:
        for pid in vmms(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def first_vmm(host: Runtime, process: subprocess.Popen[str]) -> int:
    while not (found := vmms(host)):
        assert process.poll() is None
    return found[0]


@pytest.fixture
def small(host: Runtime, tmp_path: Path, busybox_root: Artifact) -> Iterator[Runtime]:
    """A host whose store, with what a busybox guest needs, is on a disk of 360 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=360M", "small", disk], check=True)
    try:
        mine = Runtime.open(disk / "store")
        for artifact in (ensure_kernel(host.store), ensure_tools(host.store), busybox_root):
            copy_artifact(artifact, mine.store)
        yield mine
        onecopy("stop", "--all", "--now", home=mine.store.root)
        for record in mine.run.glob(".*"):
            record.unlink()
        mine.run.rmdir()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small: Runtime, busybox_root: Artifact, tmp_path: Path) -> None:
    names, home = refs(small), small.store.root
    tcg = ["--accel", ACCEL or "tcg"]
    said = refused(9, *save("big", busybox_root, "--memory", "1G", *tcg), home=home)
    assert "not enough disk: 1040 MiB needed" in said
    assert_nothing_left(small, names)

    (tmp_path / "big").mkdir()
    (tmp_path / "big/data").write_bytes(secrets.token_bytes(250 * MIB))
    assert "not enough disk" in refused(
        9, "build", "big", "--from", f"dir:{tmp_path}/big", home=home
    )
    assert_nothing_left(small, names)


def test_a_disk_that_fills_up_meanwhile(small: Runtime, busybox_root: Artifact) -> None:
    names, home = refs(small), small.store.root
    env = os.environ | {"ONECOPY_HOME": str(home)}
    args = save("full", busybox_root, "--accel", ACCEL or "tcg")
    with subprocess.Popen([ONECOPY, *args], stderr=subprocess.PIPE, text=True, env=env) as process:
        wait_for(process, "booting")
        filler = home.parent / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", 0) as file:
            while True:
                file.write(bytes(MIB))
        code, said = finish(process)
    assert code == 9, said
    filler.unlink()
    assert_nothing_left(small, names)
    # With room again, it goes.
    onecopy(*args, home=home)
    onecopy("rm", "full", home=home)


def test_an_archive_that_does_not_fit(small: Runtime, tmp_path: Path) -> None:
    names = refs(small)
    (tmp_path / "zeros").write_bytes(bytes(400 * MIB))
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "a.tar", "zeros"], check=True)
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes(), 1))
    refused(9, "build", "big", "--from", f"tar:{packed}", home=small.store.root)
    assert_nothing_left(small, names)


def test_what_cannot_be_right_is_refused_with_a_hint(
    saved: Artifact, busybox_root: Artifact
) -> None:
    def run(*options: str) -> list[str]:
        return ["run", *options, saved.ref]

    root = ["--root", busybox_root.ref, "--command", ""]
    bare = ["boot", busybox_root.ref]
    boot = ["boot", "--command", ""]
    table: list[tuple[int, list[str], str]] = [
        (2, ["build", "Web", "--from", "dir:/srv"], "'Web' is not a valid name"),
        (2, ["build", "web:", "--from", "dir:/srv"], "not a valid version"),
        (2, ["build", "web", "--from", "nothing"], "debian:SUITE"),
        (2, ["build", "web", "--from", "dir:/srv", "--fs", "xfs"], "'erofs'"),
        (8, ["build", "web", "--from", "dir:/no/such"], "cannot open the directory"),
        (8, ["build", "web", "--from", "tar:/etc/passwd"], "cannot unpack"),
        (3, ["save", "x", "--root", "no-such"], "there is no segment no-such:latest"),
        (3, ["save", "x", "--root", saved.ref], "not a segment"),
        (2, ["save", "x@sha256:12", *root], "is not a valid digest"),
        (9, ["save", "x", *root, "--memory", "8M"], "at least --memory 128M"),
        (9, [*boot, "--memory", "0", busybox_root.ref], "at least --memory 128M"),
        (2, ["save", "x", *root, "--memory", "lots"], "256M or 1G"),
        (2, ["save", "x", *root, "--memory", "-5M"], "is not a valid size"),
        (9, ["save", "x", *root, "--memory", "9999G"], "not enough memory"),
        (2, ["save", "x", *root, "--cpus", "0"], "1<=x<=64"),
        (2, ["save", "x", *root, "--timeout", "0"], "1<=x<="),
        (2, ["save", "x", *root, "--segment", "busybox"], "busybox is used twice"),
        (2, ["save", "x", *root, "--segment", "busybox:/"], ""),
        (2, ["save", "x", *root, "--segment", "busybox:/a/../b"], "absolute path"),
        (2, ["save", "x", *root, *["--segment", "busybox:/a"] * 2], "/a is used twice"),
        (3, ["save", "x", *root, "--segment", "no-such:/a"], "there is no segment"),
        (8, [*boot, "--kernel", "/no/such", busybox_root.ref], "--modules"),
        (2, bare, "has no init (/sbin/init)"),
        (2, ["save", "x", "--root", busybox_root.ref], "give a command with --command"),
        (3, ["run", "no-such"], "there is no system no-such:latest"),
        (3, ["run", busybox_root.ref], "onecopy save NAME --root busybox:latest"),
        (3, ["boot", saved.ref], "`onecopy run saved:latest`"),
        (5, ["save", busybox_root.ref, *root], "is a segment"),
        (2, ["save", "x@sha256:123456", *root], "cannot be a new name"),
        (3, ["run", f"saved@sha256:{64 * '0'}"], "there is no system"),
        (2, run("--name", "UPPER"), "not a valid guest name"),
        (2, run("--name", "under_score"), "not a valid guest name"),
        (2, run("--name", "x" * 64), "1-63"),
        (2, run("-n", "3", "--name", "x" * 63), "1-63"),
        (2, run("-n", "0"), "1<=x<=10000"),
        (2, run("-p", "http"), "-p 8080:80"),
        (2, run("-p", "80:"), "-p 8080:80"),
        (2, run("-p", "70000:80"), "1 to 65535"),
        (2, run("-p", "8080:0"), "1 to 65535"),
        (2, run("-n", "2", "-p", "65535:80"), "the limit is 65535"),
        (2, run("--ready", "true"), "has no option --ready"),
        (2, run("--accel", "xen"), "'tcg'"),
        (3, ["stop", "nobody"], "onecopy ps"),
        (3, ["logs", "nobody"], "onecopy ps"),
        (3, ["console", "nobody"], "onecopy ps"),
        (3, ["inspect", "nobody"], "there is no"),
        (3, ["rm", "nobody"], "there is no"),
        (3, ["verify", "nobody"], "there is no"),
        (2, ["no-such-command"], "has no command 'no-such-command'"),
    ]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda row: onecopy(*row[1], code=None), table))
    wrong = [
        (row, done.returncode, done.stderr)
        for row, done in zip(table, results, strict=True)
        if done.returncode != row[0] or row[2] not in done.stderr
    ]
    assert wrong == []
    assert all(done.stdout == "" for done in results)


def test_a_device_state_that_was_changed(host: Runtime, saved: Artifact) -> None:
    path = saved.layer("state").path
    whole = path.read_bytes()
    middle = len(whole) // 2
    try:
        path.chmod(0o644)
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        path.chmod(0o444)
        said = refused(errors.StoreDamaged.exit_code, "run", saved.ref)
    finally:
        path.chmod(0o644)
        path.write_bytes(whole)
        path.chmod(0o444)
    assert "differs from what was saved" in said
    assert not host.guests()


def test_two_saves_of_one_name_at_once(host: Runtime, busybox_root: Artifact) -> None:
    with ThreadPoolExecutor(2) as pool:
        texts = [f"save {number}" for number in (1, 2)]
        commands = [f"echo {text}; exec sleep 1000000" for text in texts]
        both = [save("twice", busybox_root, "--command", command) for command in commands]
        results = list(pool.map(lambda args: onecopy(*args), both))
    system = host.store.resolve(Reference("twice"))
    assert system.digest in {done.stdout.split()[1] for done in results}
    # What the other had saved is gone, and this one starts.
    check_whole(host.store.root)
    done = onecopy("run", "twice", "--", "cat", "/run/onecopy/run")
    assert done.stdout.split(";")[0] in [f"echo {text}" for text in texts]
    onecopy("rm", "twice")


def test_removing_what_another_command_starts(host: Runtime, saved: Artifact) -> None:
    for number in range(8):
        again(host, saved, number)
        late = random.uniform(0, 0.4)  # noqa: S311
        with ThreadPoolExecutor(2) as pool:
            start = pool.submit(onecopy, "run", "--name", "racer", "--json", "race", code=None)
            time.sleep(late)
            remove = pool.submit(onecopy, "rm", "race", code=None)
        ran, removed = start.result(), remove.result()
        assert ran.returncode in (0, 3), ran.stderr
        assert removed.returncode in (0, 4), removed.stderr
        # One of them has won: what runs is not removed.
        assert (ran.returncode, removed.returncode) != (0, 0) or ended(ran.stdout)
        if ran.returncode == 0:
            onecopy("exec", "racer", "true")
            onecopy("stop", "--now", "racer")
        if removed.returncode == 4:
            assert "in use by racer" in removed.stderr
            onecopy("rm", "race")
    check_whole(host.store.root)


def ended(said: str) -> bool:
    """Whether the guest that a command told of is no more."""
    (guest,) = json.loads(said)["guests"]
    return not Path(f"/proc/{guest['pid']}").exists()


def again(host: Runtime, saved: Artifact, number: int) -> None:
    """The saved system once more as ``race``, with a blob of its own that a removal takes away."""
    with host.store.workspace() as work:
        layers = []
        for layer in saved.layers:
            if layer.annotations.get("org.onecopy.role") == "state":
                state = work / "state"
                # QEMU reads up to the end mark, and no further.
                state.write_bytes(layer.path.read_bytes() + bytes([number]))
                layers.append(NewLayer(state, layer.media_type, layer.annotations))
            else:
                fields = layer.media_type, layer.annotations, layer.digest, layer.size
                layers.append(NewLayer(None, *fields))
        host.store.put("system", Reference("race"), saved.config, layers)


def test_a_port_that_is_lost_to_another_program_meanwhile(
    guests: Guests, busybox_root: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was free when it was looked at: QEMU finds it taken, and does not say which."""
    free = ports.require_free

    def lose(publish: ports.Ports) -> None:
        free(publish)
        monkeypatch.setattr("onecopy.guest.lifecycle.launchplan.require_free", free)
        taken.bind(("127.0.0.1", publish[0][0]))
        taken.listen()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr("onecopy.guest.lifecycle.launchplan.require_free", lose)
    with socket.socket() as taken, pytest.raises(InUse, match=f"port {port} on 127.0.0.1 is taken"):
        guests.boot(busybox_root, publish=[(port, 80)], command="sleep 600")
