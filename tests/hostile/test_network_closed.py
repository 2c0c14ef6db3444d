"""What a guest reaches by its network: the outside, and nothing of the host or of other guests.

Tried from within guests, on a host of the test's own (net_world.py), whose services first answer
the host itself. Not here: guests in a bridge (tests/vm/test_network.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from onecopy.errors import CommandFailed, Incompatible
from onecopy.guest.exec import run_captured
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.store import Artifact, Store
from onecopy.vmm.argv import GATEWAY, NAME_SERVER, NETWORK
from onecopy.vmm.vmm_user import User
from tests.hostile.net_world import HOST, METADATA, OUTSIDE, PORT, RESOLVER, World, world
from tests.unit.other_user import NOBODY
from tests.vm.kept import copy_artifact

Try = tuple[str, str, int]
#: What listens on the host's 127.0.0.1, as a guest gets there.
GATEWAY_PORT: Try = ("tcp", str(GATEWAY), PORT)
SAVED = "saved:latest"

#: Tries what its argument lists, [kind, address, port], at once, and prints how each ended and
#: after how many seconds. "forged" is a TCP connection that the guest's own kernel would not make:
#: its frames go to the gateway, whatever the address.
PROBE = """
import concurrent.futures, errno, json, socket, struct, sys, time

def tcp(address, port):
    with socket.create_connection((address, port), 20) as s:
        return s.recv(100).decode()

def answer(s, data, more):
    "What comes back of what is sent again each second."
    s.settimeout(1)
    for last in [False] * 5 + [True]:
        s.send(data)
        try:
            return more()
        except TimeoutError:
            if last:
                raise

def udp(address, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        s.connect((address, port))
        return answer(s, b"?", lambda: s.recv(100).decode())

def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff

def forged(address, port):
    "Sends a SYN; what flags come back."
    mine = socket.inet_aton(json.loads(sys.argv[2]))
    theirs = socket.inet_aton(address)
    tcp = struct.pack(">HHIIBBHHH", 40000, port, 7, 0, 0x50, 2, 8192, 0, 0)
    pseudo = mine + theirs + struct.pack(">HH", 6, len(tcp))
    tcp = tcp[:16] + struct.pack(">H", checksum(pseudo + tcp)) + tcp[18:]
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0, mine, theirs)
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as s:
        s.bind(("eth0", 0x0800))

        def flags():
            while True:
                packet = s.recv(2000)[14:]
                if packet[9] == 6 and packet[12:16] == theirs:
                    return "answered" if packet[33] & 2 else "reset"

        # To whatever plays the gateway: it takes all frames that it is sent.
        gateway = b"\\x52\\x55\\xc6\\x12\\x00\\x02"
        return answer(s, gateway + s.getsockname()[4] + b"\\x08\\x00" + ip + tcp, flags)

def tried(what):
    kind, address, port = what
    began = time.monotonic()
    try:
        how = globals()[kind](address, port)
    except OSError as error:
        how = errno.errorcode.get(error.errno, "timeout")
    return json.dumps([how, time.monotonic() - began])

with concurrent.futures.ThreadPoolExecutor(20) as pool:
    for line in pool.map(tried, json.loads(sys.argv[1])):
        print(line)
"""

REFUSED = {"ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "EACCES", "EPERM", "reset"}


class Trial:
    """Somebody who runs guests on the host of the test's own: root, or an ordinary user."""

    def __init__(self, here: World, host: Runtime, home: Path | None) -> None:
        self.here, self.host, self._home = here, host, home
        self.is_root = home is None

    def onecopy(self, *arguments: str, before: Sequence[str] = ()) -> str:
        return self.here.onecopy(*arguments, home=self._home, before=before)

    @contextmanager
    def running(self, *options: str, before: Sequence[str] = ()) -> Iterator[list[GuestRecord]]:
        """Clones, started with options of `run`."""
        said = self.onecopy("run", *options, "--json", SAVED, before=before)
        started = json.loads(said)["guests"]
        records = [self.host.guest(each["name"]).record() for each in started]
        try:
            yield records
        finally:
            self.host.end(*records)

    def tried(self, guest: GuestRecord, *what: Try) -> dict[Try, str]:
        """How each try ended; those that were refused were refused at once."""
        line = ["python3", "-c", PROBE, json.dumps(what), json.dumps(guest.address)]
        done = asyncio.run(run_captured(self.host.run / guest.name, line, timeout=120))
        assert done.exit_code == 0, done
        results = [json.loads(line) for line in done.text.splitlines()]
        for one, (how, seconds) in zip(what, results, strict=True):
            assert how not in REFUSED or seconds < 5, (one, how, seconds)
        return dict(zip(what, (how for how, _ in results), strict=True))

    def fetched(self, guest: GuestRecord) -> str:
        """What the guest answers at its published port."""
        ((port, _),) = guest.publish
        return self.here.run("wget", "-qO-", "-T", "60", f"http://127.0.0.1:{port}/").strip()


@pytest.fixture(scope="module")
def here(host: Runtime, saved: Artifact) -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture(scope="module")
def root(here: World, host: Runtime, saved: Artifact) -> Trial:
    return Trial(here, host, None)


@pytest.fixture(scope="module")
def user(here: World, saved: Artifact) -> Iterator[Trial]:
    """An ordinary user, whose store has the saved system."""
    with tempfile.TemporaryDirectory(prefix="onecopy-user-") as folder:
        home = Path(folder)
        store = Store(home / "store")
        copy_artifact(saved, store)
        (home / "run").mkdir(mode=0o700)
        told = store.root.stat()
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        run = home / f"run/onecopy/{told.st_dev:x}-{told.st_ino:x}"
        host = Runtime(store, run)
        yield Trial(here, host, home)
        host.end(*host.guests(), *host.prepared())


@pytest.fixture(scope="module", params=["root", "user"])
def who(request: pytest.FixtureRequest) -> Trial:
    found: Trial = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def two(who: Trial) -> Iterator[list[GuestRecord]]:
    """Two closed clones with a published port each."""
    with who.running("-n", "2", "--name", "closed", "-p", "0:80") as guests:
        yield guests


def _from_host(here: World, kind: str, address: str, port: int) -> str:
    """What the host itself gets there: else no refusal would prove anything."""
    line = PROBE.replace("json.loads(sys.argv[2])", '"0.0.0.0"')
    how, _ = json.loads(here.run("python3", "-c", line, json.dumps([[kind, address, port]])))
    return str(how)


def _assert_closed(tried: Mapping[Try, str]) -> None:
    got = {one: how for one, how in tried.items() if how not in {*REFUSED, "timeout"}}
    assert not got, "reached from a guest"
    late = [one for one, how in tried.items() if how == "timeout" and one[0] != "udp"]
    assert not late, "not refused, but left to wait"


def test_a_guest_reaches_nothing_of_the_host(
    here: World, who: Trial, two: list[GuestRecord]
) -> None:
    guest, other = two
    ((published, _),) = other.publish
    for address in ("127.0.0.1", HOST, METADATA):
        for kind in ("tcp", "udp"):
            assert _from_host(here, kind, address, PORT) in ("host", "outside")
    assert _from_host(here, "tcp", RESOLVER, 80) == "host"
    _assert_closed(
        who.tried(
            guest,
            GATEWAY_PORT,
            ("tcp", str(GATEWAY), published),
            ("tcp", str(NAME_SERVER), 80),
            ("tcp", HOST, PORT),
            ("tcp", HOST, published),
            ("tcp", METADATA, PORT),
            ("udp", str(GATEWAY), PORT),
            ("udp", HOST, PORT),
            ("udp", METADATA, PORT),
            ("udp", str(NAME_SERVER), PORT),
            ("forged", HOST, PORT),
        )
    )
    # What no kernel sends may also be dropped. slirp makes 127.0.0.1 of all its network.
    odd = [("127.0.0.1", PORT), (RESOLVER, 80), (str(NETWORK[9]), PORT)]
    tried = who.tried(guest, *(("forged", *each) for each in odd))
    assert set(tried.values()) <= {"reset", "timeout"}


def test_a_guest_reaches_the_outside_and_its_name_server(
    who: Trial, two: list[GuestRecord]
) -> None:
    outside = ("tcp", OUTSIDE, PORT), ("udp", OUTSIDE, PORT), ("forged", OUTSIDE, PORT)
    names = ("udp", str(NAME_SERVER), 53)
    tried = who.tried(two[0], *outside, names)
    assert [tried[each] for each in outside] == ["outside", "outside", "answered"]
    assert tried[names] == "host"


def test_published_ports_answer(who: Trial, two: list[GuestRecord]) -> None:
    assert [who.fetched(guest) for guest in two] == [guest.name for guest in two]


def test_allow_host_opens_it(who: Trial) -> None:
    """What was prepared is closed, and stays so."""
    with _prepared(who) as waiting:
        _assert_open_apart(who, waiting)


@contextmanager
def _prepared(who: Trial) -> Iterator[GuestRecord]:
    """One guest that waits."""
    who.onecopy("pool", SAVED, "1")
    try:
        (waiting,) = who.host.prepared()
        yield waiting
    finally:
        who.onecopy("pool", SAVED, "0")


def _assert_open_apart(who: Trial, waiting: GuestRecord) -> None:
    with who.running("--allow-host") as (guest,):
        assert (guest.allow_host, waiting.allow_host) == (True, False)
        assert guest.pid != waiting.pid
        tried = who.tried(guest, GATEWAY_PORT, ("tcp", HOST, PORT), ("tcp", OUTSIDE, PORT))
        assert list(tried.values()) == ["host", "host", "outside"]
    if who.is_root:
        who.here.run("nft", "delete", "table", "inet", "onecopy")
    with who.running("-p", "0:80") as (guest,):
        assert guest.pid == waiting.pid
        _assert_closed(who.tried(guest, GATEWAY_PORT))
        assert who.fetched(guest) == guest.name


def test_rules_that_were_flushed_are_put_back(here: World, root: Trial, saved: Artifact) -> None:
    """For guests that run, too, and nobody else's are touched."""
    here.run("nft", "add", "table", "inet", "other")
    with root.running() as (guest,):
        before = here.run("nft", "list", "table", "inet", "onecopy")
        for removal in ("delete table inet onecopy", "flush chain inet onecopy closed"):
            here.run("nft", *removal.split())
            assert root.tried(guest, GATEWAY_PORT) == {GATEWAY_PORT: "host"}
            with root.running() as (clone,):
                for each in (clone, guest):
                    _assert_closed(root.tried(each, GATEWAY_PORT))
            assert here.run("nft", "list", "table", "inet", "onecopy") == before
    assert "other" in here.run("nft", "list", "tables")


#: Runs what its arguments say as root of a container that has 65,536 user numbers.
CONTAINER = """
import ctypes, os, sys
ready, made = os.pipe(), os.pipe()
child = os.fork()
if not child:
    if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
        os._exit(99)
    os.write(ready[1], b".")
    os.read(made[0], 1)
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(ready[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{child}/{name}", "w") as file:
        file.write("0 0 65536")
os.write(made[1], b".")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_root_of_a_container_whose_numbers_others_have_too(root: Trial) -> None:
    contained = [sys.executable, "-c", CONTAINER]
    with root.running("-p", "0:80", before=contained) as (guest,):
        user = User.of(guest.pid)
        assert user and user.id < 65536
        tried = root.tried(guest, GATEWAY_PORT, ("tcp", HOST, PORT), ("tcp", OUTSIDE, PORT))
        assert tried.popitem()[1] == "outside"
        _assert_closed(tried)
        assert root.fetched(guest) == guest.name


def test_what_takes_a_users_guest_outside_ends_with_it(user: Trial) -> None:
    with user.running() as (guest,):
        name = f"--api-socket={user.host.run}/{guest.name}/".encode()
        assert len(_with_argument(name)) == 1
        os.kill(guest.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while _with_argument(name) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _with_argument(name)


def _with_argument(start: bytes) -> list[int]:
    """Processes with such an argument."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"\0" + start in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


#: Hides a program from a command, and takes its right to set rules.
HIDDEN = 'mount --bind /dev/null "$(command -v {})" && exec "$@"'
CANNOT = {
    "'nft' is not installed": ["unshare", "--mount", "sh", "-c", HIDDEN.format("nft"), "sh"],
    "not permitted": ["setpriv", "--bounding-set=-net_admin"],
}


@pytest.mark.parametrize("reason", CANNOT)
def test_what_cannot_be_enforced_is_refused(here: World, saved: Artifact, reason: str) -> None:
    for change in ("add", "delete"):  # whether it is there or not
        here.run("nft", change, "table", "inet", "onecopy")
    with pytest.raises(CommandFailed, match=reason) as failed:
        here.onecopy("run", saved.ref, before=CANNOT[reason])
    assert "--allow-host" in failed.value.output
    assert failed.value.returncode == Incompatible.exit_code
    here.onecopy("run", "--allow-host", saved.ref, "--", "true", before=CANNOT[reason])


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("$(command -v slirp4netns)", "'slirp4netns' is not installed"),
        ("$(command -v nft)", "'nft' is not installed"),
        ("/dev/net/tun", "/dev/net/tun|tap"),
        ("$(command -v unshare)", "'unshare' is not installed"),
    ],
)
def test_what_an_ordinary_user_lacks_is_told(user: Trial, place: str, reason: str) -> None:
    hide = f'mount --bind /dev/null "{place}" && exec "$@"'
    lacking = ["unshare", "--mount", "sh", "-c", hide, "sh"]
    with pytest.raises(CommandFailed, match=reason) as failed:
        user.onecopy("run", "--name", "lacking", SAVED, before=lacking)
    assert "--allow-host" in failed.value.output
    assert failed.value.returncode == Incompatible.exit_code
    assert not (user.host.run / "lacking").exists()
