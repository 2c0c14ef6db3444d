"""The life of a guest through the real command: build, save, run, examine, stop, remove.

The command's output is compared with /proc, QMP, the store's files and the guest. Not here:
`onecopy exec` (test_exec.py), failures (test_bad_luck.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecopy.guest.runtime import Runtime
from onecopy.images.kernel import KernelConfig, ensure_kernel
from onecopy.model import MIB
from onecopy.store import Artifact
from onecopy.vmm.argv import FIRST_ADDRESS
from onecopy.vmm.monitor import connect
from tests.command import ONECOPY, answer, onecopy
from tests.conftest import cannot_run
from tests.vm.conftest import vmms

#: The guest that several tests share, since it takes long to boot.
LASTING = "lasting"


def get(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    text = connection.getresponse().read().decode().strip()
    connection.close()
    return text


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row."""
    while True:
        first = random.randint(20000, 30000)  # noqa: S311
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first


def names(host: Runtime) -> set[str]:
    return {guest.name for guest in host.guests()} - {LASTING}


def assert_no_trace(host: Runtime, name: str) -> None:
    """No VMM, run folder or lease of this guest."""
    assert not (host.run / name).exists()
    assert not host.store.is_held(name)
    assert [p for p in vmms(host) if f"guest={name}" in real_command(p)] == []


def real_command(pid: int) -> list[str]:
    """What QEMU was really started with: its files by path, but no numbers of its sockets.

    Each guest's addresses are those that a dry run shows.
    """
    proc = Path(f"/proc/{pid}")
    line = (proc / "cmdline").read_bytes().decode()
    line = re.sub(r"\bfd=\d+", "fd=FD", line)
    line = re.sub(r"\bmac=[0-9a-f:]+", "mac=52:54:00:12:34:56", line)
    line = re.sub(r"\bdhcpstart=[0-9.]+", f"dhcpstart={FIRST_ADDRESS}", line)
    line = re.sub(r"/proc/self/(fd/\d+)", lambda found: str((proc / found[1]).readlink()), line)
    line = line.replace(" (deleted)", "")
    line = re.sub(r"(?<==)\./", f"{(proc / 'cwd').readlink()}/", line)
    return line.split("\0")[:-1]


def dry_run(*args: str) -> list[str]:
    return shlex.split(onecopy(args[0], "--dry-run", *args[1:]).stdout)


@pytest.fixture(autouse=True)
def _end_guests(host: Runtime) -> Iterator[None]:
    yield
    for guest in host.guests():
        if guest.name != LASTING:
            host.end(guest)


@pytest.fixture(scope="module")
def web(host: Runtime, busybox_root: Artifact, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A segment and a system that the command built and saved: busybox's HTTP server."""
    tree = tmp_path_factory.mktemp("web")
    (tree / "bin").mkdir()
    (tree / "www").mkdir()
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    (tree / "www/index.html").write_text("a page of the web segment")
    built = onecopy("build", "web-root", "--from", f"dir:{tree}").stdout.split()
    assert built[0] == "web-root:latest"
    options = ["--root", "web-root", "--memory", "128M"]
    options += ["--command", "busybox httpd -f -p 80 -h /www"]
    saved = onecopy("save", "web", *options, "--ready", "wget -q -O - http://127.0.0.1/")
    assert saved.stdout.split()[0] == "web:latest"
    ls = {item["name"]: item for item in answer("ls", "--json")}
    assert ls["web-root"]["digest"] == built[1]
    assert ls["web"]["digest"] == saved.stdout.split()[1]
    return "web"


@pytest.fixture(scope="module")
def modules(host: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stored kernel's folder lib/modules/RELEASE."""
    kernel = ensure_kernel(host.store)
    point = tmp_path_factory.mktemp("modules")
    image = kernel.layer("modules").path
    done = subprocess.run(["mount", "-o", "ro,loop", image, point], capture_output=True, text=True)
    if done.returncode:
        cannot_run(f"the host cannot mount an image: {done.stderr}")
    yield point / KernelConfig.of(kernel).release
    subprocess.run(["umount", point], check=True)


@pytest.fixture(scope="module")
def lasting(host: Runtime, web: str, modules: Path) -> Iterator[dict[str, Any]]:
    """A booted guest on an ext2 root, with a kernel of the user's; its JSON and its dry run."""
    segment = answer("inspect", "web-root")["layers"][0]["path"]
    with contextlib.ExitStack() as stack:
        point = stack.enter_context(mounted(segment, modules.parent.with_name("web-root")))
        onecopy("build", "web-ext2", "--from", f"dir:{point}", "--fs", "ext2")
        onecopy("build", "web-data", "--from", f"dir:{point}", "--fs", "ext2", "--free-space", "4M")
    kernel = ensure_kernel(host.store).layer("kernel").path
    args = ["boot", "--json", "--name", LASTING, "--memory", "128M", "-p", "0:80"]
    args += ["--segment", "web-data:/data", "--command", "busybox httpd -f -p 80 -h /www"]
    args += ["--kernel", str(kernel), "--modules", str(modules), "web-ext2"]
    planned = dry_run(*args)
    (guest,) = answer(*args)["guests"]
    yield {**guest, "planned": planned}
    for record in host.guests():
        host.end(record)


@contextlib.contextmanager
def mounted(image: str, point: Path) -> Iterator[Path]:
    point.mkdir()
    subprocess.run(["mount", "-o", "ro,loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


def test_ls_and_inspect_tell_what_is_in_the_store(host: Runtime, web: str) -> None:
    # What a file takes changes as long as it is written to the disk.
    os.sync()
    listed = answer("ls", "--json")
    assert {(item["name"], item["kind"]) for item in listed} >= {
        ("web-root", "segment"),
        ("web", "system"),
        ("onecopy-kernel", "kernel"),
    }
    for item in listed:
        full = answer("inspect", f"{item['name']}:{item['version']}")
        assert full == full | {key: item[key] for key in item if key != "resident"}
        manifest = host.store.root / "blobs" / item["digest"].replace(":", "/")
        assert "sha256:" + hashlib.sha256(manifest.read_bytes()).hexdigest() == item["digest"]
        stats = [Path(layer["path"]).stat() for layer in full["layers"]]
        assert [layer["size"] for layer in full["layers"]] == [stat.st_size for stat in stats]
        assert [layer["disk"] for layer in full["layers"]] == [s.st_blocks * 512 for s in stats]
        assert item["size"] == sum(stat.st_size for stat in stats)
        assert 0 <= item["resident"] <= item["size"]
        assert item["created"] and item["users"] == []
    assert [item["name"] for item in answer("ls", "--json", "--kind", "system")].count("web") == 1

    system = answer("inspect", web)
    assert system["config"]["memory"] == 128 << 20
    ram = next(item for item in system["layers"] if item["size"] == 128 << 20)
    assert ram["disk"] < ram["size"], "pages of zeroes take no disk"
    verified = onecopy("verify", web, "web-root").stdout.splitlines()
    assert verified == [
        "web:latest is whole, its file systems are sound: erofs, erofs, erofs",
        "web-root:latest is whole, its file systems are sound: erofs",
    ]


def test_run_ps_and_inspect_are_right_about_guests(host: Runtime, web: str) -> None:
    started = answer("run", "-n", "2", "--name", "w", "-p", "0:80", "--json", web)
    assert started["failures"] == []
    guests = started["guests"]
    assert [guest["name"] for guest in guests] == ["w-1", "w-2"]
    assert answer("ps", "--json") == guests
    system = answer("inspect", web)
    assert system["users"] == ["w-1", "w-2"]
    for guest in guests:
        told = answer("inspect", guest["name"])
        assert told.pop("account")["pid"] == guest["pid"]
        assert told == guest
        assert (guest["kind"], guest["source"]) == ("clone", "web:latest")
        assert guest["digest"] == system["digest"]
        assert str(host.run / guest["name"]) in " ".join(real_command(guest["pid"]))
        assert abs(guest["started"] - Path(f"/proc/{guest['pid']}").stat().st_mtime) < 60
        assert guest["accel"] in ("kvm", "tcg")
        line = real_command(guest["pid"])
        assert line[line.index("-accel") + 1].partition(",")[0] == guest["accel"]
        assert asyncio.run(memory_of(host, guest["name"])) == guest["memory"]
        maps = Path(f"/proc/{guest['pid']}/maps").read_text()
        assert re.search(rf"rw-p .* {guest['ram_path']}$", maps, re.MULTILINE)
        assert guest["attached"][0]["name"] == "web-root"
        assert len(guest["attached"]) == 3
        for segment in guest["attached"]:
            (device,) = segment["devices"]
            assert (device["page_class"], segment["state"]) == ("SR", "loaded")
            assert re.search(rf"r--s .* {device['path']}$", maps, re.MULTILINE)
        ((port, inside),) = guest["publish"]
        assert inside == 80
        assert get(port) == "a page of the web segment"
    table = onecopy("ps").stdout
    assert "w-1" in table and f"{guests[0]['publish'][0][0]}->80" in table


async def memory_of(host: Runtime, name: str) -> Any:
    async with connect(host.run / name) as monitor:
        return (await monitor.execute("query-memory-size-summary"))["base-memory"]


def test_report_is_what_the_kernel_counts(host: Runtime, web: str) -> None:
    guests = answer("run", "-n", "2", "--name", "r", "--json", web)["guests"]
    for guest in guests:
        asyncio.run(halt(host, guest["name"]))
    report = answer("report", "--json")
    accounts = {account["name"]: account for account in report["guests"]}
    for guest in guests:
        told = accounts[guest["name"]]
        ram = counted(guest["pid"], guest["ram_path"])
        assert told["pid"] == guest["pid"]
        assert told["ram_size"] == guest["memory"]
        assert told["ram_private"] == ram["Anonymous"] > 0
        assert told["ram_shared"] == ram["Rss"] - ram["Anonymous"] > 0
        for segment in told["segments"]:
            mine = counted(guest["pid"], segment["path"])
            assert (segment["mapped"], segment["resident"]) == (mine["Size"], mine["Rss"])
        assert told["note"] == ""
    # With other tests' guests, which come and go, these share QEMU: asked before and after, too.
    deadline = time.monotonic() + 120
    while not pss_is_told(guests):
        assert time.monotonic() < deadline
    for blob in report["blobs"]:
        if blob["kind"] == "ram" and "r-1" in blob["name"]:
            assert (blob["guests"], blob["size"]) == (2, guests[0]["memory"])
    assert "RAM OWN" in onecopy("report").stdout


def pss_is_told(guests: list[dict[str, Any]]) -> bool:
    """Whether the report has the shares of memory that the kernel told before and after."""
    before = {guest["name"]: counted(guest["pid"], "")["Pss"] for guest in guests}
    report = answer("report", "--json")
    after = {guest["name"]: counted(guest["pid"], "")["Pss"] for guest in guests}
    told = {each["name"]: each["pss_total"] for each in report["guests"]}
    return all(abs(told[name] - each[name]) < MIB for name in before for each in (before, after))


async def halt(host: Runtime, name: str) -> None:
    """Stop the guest's processors, so that two looks at its memory see the same."""
    async with connect(host.run / name) as monitor:
        await monitor.execute("stop")


def counted(pid: int, path: str) -> dict[str, int]:
    """Sums in bytes over a process's mappings whose file is ``path``; "" for all (proc(5))."""
    sums: dict[str, int] = {}
    wanted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            wanted = not path or line.endswith(f" {path}")
        elif wanted and (found := re.match(r"(\w+): +(\d+) kB", line)):
            sums[found[1]] = sums.get(found[1], 0) + (int(found[2]) << 10)
    return sums


def test_logs_and_console(web: str) -> None:
    onecopy("run", "--name", "talker", web)
    echo = 'read line </dev/ttyS0; echo "heard $line" >/dev/ttyS0'
    with (
        subprocess.Popen(
            [ONECOPY, "console", "talker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as console,
        subprocess.Popen([ONECOPY, "exec", "talker", "--", "sh", "-c", echo]) as listener,
    ):
        assert console.stdin and console.stdout
        console.stdin.write(b"something\n")
        console.stdin.flush()
        said = b""
        while b"heard something" not in said:
            said += os.read(console.stdout.fileno(), 1000)
        assert listener.wait(60) == 0
        console.stdin.write(b"\x1d")
        console.stdin.flush()
        assert console.wait(60) == 0
    assert "heard something" in onecopy("logs", "talker").stdout
    lines = onecopy("logs", "--qemu", "talker").stdout.splitlines()
    # The first since QEMU 9.1, older ones know no other way; the second where KVM's host has fewer
    # processors than a guest can be given.
    known = ("fd: migration to a file is deprecated", "exceeds the recommended cpus supported")
    assert [line for line in lines if not any(words in line for words in known)] == []
    assert "no guest 'nobody'" in onecopy("logs", "nobody", code=3).stderr


def test_dry_run_is_what_really_runs(host: Runtime, web: str, lasting: dict[str, Any]) -> None:
    port = free_ports(2)
    args = ["-n", "2", "--name", "same", "-p", f"{port}:80", web]
    planned = onecopy("run", "--dry-run", *args).stdout.splitlines()
    assert names(host) == set()
    guests = answer("run", "--json", *args)["guests"]
    assert [shlex.split(line) for line in planned] == [real_command(g["pid"]) for g in guests]
    assert lasting["planned"] == real_command(lasting["pid"])

    options = ["--root", "web-root", "--command", "", "--dry-run"]
    save = shlex.split(onecopy("save", "no", *options).stdout)
    assert Path(save[0]).name == "qemu-system-x86_64"
    assert any(word.startswith("memory-backend-ram,id=ram") for word in save)
    assert "no" not in {item["name"] for item in answer("ls", "--json")}


def test_four_at_once_answer_with_their_own_names(saved: Artifact) -> None:
    first = free_ports(4)
    args = ["run", "-n", "4", "--name", "web", "-p", f"{first}:80", "--json", saved.ref]
    guests = answer(*args)["guests"]
    assert [guest["publish"] for guest in guests] == [[[first + i, 80]] for i in range(4)]
    assert [get(first + i) for i in range(4)] == [f"web-{i + 1}" for i in range(4)]
    done = onecopy("stop", *(guest["name"] for guest in guests))
    assert done.stdout.splitlines() == [f"web-{i + 1} shut down" for i in range(4)]
    with pytest.raises(ConnectionError):
        get(first)


def test_a_guest_for_one_command(host: Runtime, web: str) -> None:
    done = onecopy("run", web, "--", "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert done.stdout == "out\n"
    assert done.stderr.endswith("err\n")
    assert names(host) == set() and answer("ps", "--json") in ([], [_lasting(host)])
    onecopy("run", "--name", "kept", "--keep", web, "--", "true")
    assert names(host) == {"kept"}


def _lasting(host: Runtime) -> Any:
    return next((item for item in answer("ps", "--json") if item["name"] == LASTING), None)


def test_a_taken_name(host: Runtime, web: str) -> None:
    (first,) = answer("run", "--name", "a-2", "--json", web)["guests"]
    assert "a-2 is already running" in onecopy("run", "--name", "a-2", web, code=5).stderr
    # All or none: neither a-1 nor a-3 stays.
    onecopy("run", "-n", "3", "--name", "a", web, code=5)
    assert names(host) == {"a-2"}
    told = answer("inspect", "a-2")
    del told["account"]
    assert told == first
    for name in ("a-1", "a-3"):
        assert_no_trace(host, name)


def test_a_taken_port(host: Runtime, web: str) -> None:
    first = free_ports(4)
    args = ["run", "-n", "4", "--name", "p", "-p", f"{first}:80"]
    with socket.create_server(("127.0.0.1", first + 2)):
        assert f"port {first + 2} on 127.0.0.1 is taken" in onecopy(*args, web, code=4).stderr
        assert names(host) == set()
        for number in range(1, 5):
            assert_no_trace(host, f"p-{number}")

        kept = answer(*args, "--keep-going", "--json", web, code=4)
        assert [guest["name"] for guest in kept["guests"]] == ["p-1", "p-2", "p-4"]
        assert [(each["name"], each["error"]) for each in kept["failures"]] == [("p-3", "in-use")]
        assert names(host) == {"p-1", "p-2", "p-4"}
        assert_no_trace(host, "p-3")
    # A guest of ours may hold it, too.
    assert "is taken" in onecopy("run", "-p", f"{first}:80", web, code=4).stderr


def test_more_than_the_host_has_memory_for(host: Runtime, web: str) -> None:
    """The host's memory is real, and the guests' are not begun."""
    refused = onecopy("run", "-n", "10000", "--name", "many", web, code=9)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fit = int(re.search(r"so (\d+) more would fit", refused.stderr)[1])  # type: ignore[index]
    assert 0 < fit * 20 * MIB < total
    assert not [each.name for each in host.guests() if each.name.startswith("many")]
    # The kernel itself refuses one mapping of more than there is.
    boot = ["boot", "--command", "", "--memory", f"{(total >> 20) * 99 // 100}M"]
    assert "0 more would fit" in onecopy(*boot, "web-root", code=9).stderr
    (guest,) = answer(*boot, "--overcommit", "--json", "web-root")["guests"]
    assert onecopy("exec", guest["name"], "cat", "/proc/meminfo").stdout.startswith("MemTotal:")
    onecopy("stop", guest["name"])


def test_stopping_asks_waits_and_ends(host: Runtime, web: str) -> None:
    guests = answer("run", "-n", "3", "--name", "s", "--json", web)["guests"]
    polite, frozen, at_once = (guest["name"] for guest in guests)
    assert onecopy("stop", polite).stdout == f"{polite} shut down\n"
    os.kill(guests[1]["pid"], signal.SIGSTOP)
    said = onecopy("stop", frozen, "--timeout", "2").stdout
    assert said == f"{frozen} was ended: it did not answer\n"
    assert onecopy("stop", "--now", at_once).stdout == f"{at_once} was ended\n"
    for guest in guests:
        assert not running(guest["pid"])
        assert_no_trace(host, guest["name"])
    onecopy("stop", polite, code=3)
    onecopy("stop", code=2)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_vmm_is_swept_by_the_next_command(host: Runtime, web: str) -> None:
    guests = answer("run", "-n", "2", "--name", "k", "--json", web)["guests"]
    os.kill(guests[0]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while running(guests[0]["pid"]):
        assert time.monotonic() < deadline
    assert "k-1" not in {guest["name"] for guest in answer("ps", "--json")}
    assert_no_trace(host, "k-1")
    assert not (host.store.root / "leases/k-1.json").exists()
    assert names(host) == {"k-2"}
    # Its name is free again.
    onecopy("run", "--name", "k-1", web)


def test_a_kernel_of_ones_own(modules: Path, lasting: dict[str, Any]) -> None:
    assert lasting["kind"] == "booted"
    release = onecopy("exec", LASTING, "--", "uname", "-r").stdout.strip()
    assert release == modules.name
    kernels = answer("ls", "--json", "--kind", "kernel")
    (mine,) = [item for item in kernels if item["users"] == [LASTING]]
    config = answer("inspect", f"{mine['name']}:{mine['version']}")["config"]
    assert config["release"] == release
    inside = onecopy("exec", LASTING, "--", "cat", f"/lib/modules/{release}/modules.dep").stdout
    assert "virtio_pmem.ko" in inside
    boot = ["boot", "--command", "", "--kernel", "/boot/vmlinuz", "web-root"]
    assert "need each other" in onecopy(*boot, code=8).stderr


def test_an_ext2_root_is_executed_in_place(lasting: dict[str, Any]) -> None:
    # The root's own mount is below the overlay, out of sight: mounted once more, without options,
    # the same device shows those that it has.
    script = "mkdir /tmp/root && mount -t ext4 -o ro /dev/pmem0 /tmp/root && cat /proc/mounts"
    lines = onecopy("exec", LASTING, "--", "sh", "-c", script).stdout.splitlines()
    mounts = {line.split()[1]: line.split() for line in lines}
    for device, point in (("/dev/pmem0", "/tmp/root"), ("/dev/pmem3", "/data")):
        assert mounts[point][:1] + mounts[point][2:3] == [device, "ext4"]
        assert {"ro", "dax=always"} <= set(mounts[point][3].split(","))
    assert mounts["/"][2] == "overlay"
    ((port, _),) = lasting["publish"]
    assert get(port) == "a page of the web segment"


def test_kvm_runs_guests_or_says_why_not(busybox_root: Artifact) -> None:
    findings = {item["check"]: item["says"] for item in answer("doctor", "--json")}
    accel, _, reason = findings["accelerator"].partition(": ")
    args = ["boot", "--command", "", "--memory", "128M", "--name", "v", "--accel", "kvm", "--json"]
    if accel == "kvm":
        (guest,) = answer(*args, busybox_root.ref)["guests"]
        assert guest["accel"] == "kvm"
        assert "kvm" in real_command(guest["pid"])
    else:
        refused = onecopy(*args, busybox_root.ref, code=13).stderr
        assert reason.startswith("KVM cannot be used: ") and reason in refused
        assert "--accel tcg" in refused


def test_what_is_in_use_is_not_removed(host: Runtime, web: str, lasting: dict[str, Any]) -> None:
    """The last test of this file: what others here use goes."""
    onecopy("run", "--name", "user", web)
    assert f"{web}:latest is in use by user" in onecopy("rm", web, code=4).stderr
    assert "web-ext2:latest is in use by lasting" in onecopy("rm", "web-ext2", code=4).stderr
    ram = Path(answer("inspect", "user")["ram_path"])
    onecopy("stop", "user", LASTING)
    assert onecopy("rm", web, "web-data").stdout == "web:latest removed\nweb-data:latest removed\n"
    assert onecopy("rm", "web-ext2").stdout == "web-ext2:latest removed\n"
    assert not ram.exists()
    assert "web" not in {item["name"] for item in answer("ls", "--json")}
    onecopy("run", web, code=3)
