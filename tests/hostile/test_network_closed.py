"""What a guest reaches by its network: the outside, and nothing of the host or of other guests.

Tried from within guests, on a host of the test's own (net_world.py), whose services first answer
the host itself. Not here: guests in a bridge (tests/vm/test_network.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from onecopy.errors import CommandFailed, Incompatible
from onecopy.guest.folder import GuestRecord
from onecopy.guest.host import Host
from onecopy.store import Artifact
from onecopy.vmm.argv import GATEWAY, NAME_SERVER, NETWORK
from tests.hostile.net_world import HOST, METADATA, OUTSIDE, PORT, RESOLVER, World, world
from tests.vm.conftest import RunIn

#: Tries what its argument lists, [kind, address, port], and prints how each ended and after how
#: many seconds. "forged" is a TCP connection that the guest's own kernel would not make: its frames
#: go to the gateway, whatever the address.
PROBE = """
import errno, json, socket, struct, sys, time

def tcp(address, port):
    with socket.create_connection((address, port), 20) as s:
        return s.recv(100).decode()

def udp(address, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        s.settimeout(1)
        s.connect((address, port))
        s.send(b"?")
        return s.recv(100).decode()

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
        s.settimeout(20)
        # To whatever plays the gateway: it takes all frames that it is sent.
        s.send(b"\\x52\\x55\\xc6\\x12\\x00\\x02" + s.getsockname()[4] + b"\\x08\\x00" + ip + tcp)
        while True:
            packet = s.recv(2000)[14:]
            if packet[9] == 6 and packet[12:16] == theirs:
                return "answered" if packet[33] & 2 else "reset"

for kind, address, port in json.loads(sys.argv[1]):
    began = time.monotonic()
    try:
        how = globals()[kind](address, port)
    except OSError as error:
        how = errno.errorcode.get(error.errno, "timeout")
    print(json.dumps([how, time.monotonic() - began]))
"""

REFUSED = {"ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "EACCES", "EPERM", "reset"}


@pytest.fixture(scope="module")
def here(host: Host, saved: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="module")
def two(here: World, host: Host, saved: Artifact) -> Iterator[list[GuestRecord]]:
    """Two closed clones with a published port each."""
    with _running(here, host, saved.ref, "-n", "2", "--name", "closed", "-p", "0:80") as guests:
        yield guests


@contextmanager
def _running(here: World, host: Host, *options: str) -> Iterator[list[GuestRecord]]:
    started = json.loads(here.onecopy("run", *options, "--json"))["guests"]
    records = [host.guest(each["name"]).record() for each in started]
    try:
        yield records
    finally:
        host.end(*records)


def _tried(
    run_in: RunIn, guest: GuestRecord, *what: tuple[str, str, int]
) -> dict[tuple[str, str, int], str]:
    """How each try ended; those that were refused were refused at once."""
    done = run_in(guest, "python3", "-c", PROBE, json.dumps(what), json.dumps(guest.address))
    assert done.exit_code == 0, done
    results = [json.loads(line) for line in done.text.splitlines()]
    for one, (how, seconds) in zip(what, results, strict=True):
        assert how not in REFUSED or seconds < 5, (one, how, seconds)
    return dict(zip(what, (how for how, _ in results), strict=True))


def _from_host(here: World, address: str, port: int, kind: str = "tcp") -> str:
    """What the host itself gets there: else no refusal would prove anything."""
    line = PROBE.replace("json.loads(sys.argv[2])", '"0.0.0.0"')
    what = json.dumps([[kind, address, port]])
    how, _ = json.loads(here.run("python3", "-c", line, what))
    return str(how)


def _assert_closed(tried: Mapping[tuple[str, str, int], str]) -> None:
    got = {one: how for one, how in tried.items() if how not in {*REFUSED, "timeout"}}
    assert not got, "reached from a guest"
    late = [one for one, how in tried.items() if how == "timeout" and one[0] != "udp"]
    assert not late, "not refused, but left to wait"


def test_a_guest_reaches_nothing_of_the_host(
    here: World, two: list[GuestRecord], run_in: RunIn
) -> None:
    guest, other = two
    ((published, _),) = other.publish
    targets = [("127.0.0.1", PORT), (HOST, PORT), (METADATA, PORT), (RESOLVER, 80)]
    for address, port in targets:
        assert _from_host(here, address, port) in ("host", "outside")
    for address in ("127.0.0.1", HOST, METADATA):
        assert _from_host(here, address, PORT, "udp") in ("host", "outside")
    gateway, second = str(GATEWAY), str(NETWORK[9])
    _assert_closed(
        _tried(
            run_in,
            guest,
            # slirp makes 127.0.0.1 of each address of its network, and the resolver of one.
            ("tcp", gateway, PORT),
            ("tcp", gateway, published),
            ("tcp", str(NAME_SERVER), 80),
            ("tcp", HOST, PORT),
            ("tcp", METADATA, PORT),
            ("udp", gateway, PORT),
            ("udp", HOST, PORT),
            ("udp", METADATA, PORT),
            ("udp", str(NAME_SERVER), PORT),
            ("forged", second, PORT),
            ("forged", "127.0.0.1", PORT),
            ("forged", RESOLVER, 80),
            ("forged", HOST, PORT),
        )
    )


def test_a_guest_reaches_the_outside_and_its_name_server(
    here: World, two: list[GuestRecord], run_in: RunIn
) -> None:
    outside = ("tcp", OUTSIDE, PORT), ("udp", OUTSIDE, PORT), ("forged", OUTSIDE, PORT)
    names = ("udp", str(NAME_SERVER), 53)
    tried = _tried(run_in, two[0], *outside, names)
    assert [tried[each] for each in outside] == ["outside", "outside", "answered"]
    assert tried[names] == "host"


def test_published_ports_answer(here: World, two: list[GuestRecord]) -> None:
    for guest in two:
        ((port, _),) = guest.publish
        fetched = here.run("wget", "-qO-", f"http://127.0.0.1:{port}/")
        assert fetched.strip() == guest.name


def test_rules_that_were_flushed_are_put_back(
    here: World, host: Host, two: list[GuestRecord], saved: Artifact, run_in: RunIn
) -> None:
    """And nothing else is touched; the user's number says whether a guest is closed."""
    here.run("nft", "add", "table", "inet", "other")
    before = here.run("nft", "list", "table", "inet", "onecopy")
    for removal in (
        ["delete", "table", "inet", "onecopy"],
        ["flush", "chain", "inet", "onecopy", "closed"],
    ):
        here.run("nft", *removal)
        gateway = ("tcp", str(GATEWAY), PORT)
        assert _tried(run_in, two[0], gateway) == {gateway: "host"}
        with _running(here, host, saved.ref) as (clone,):
            for guest in (clone, two[0]):
                _assert_closed(_tried(run_in, guest, gateway))
        assert here.run("nft", "list", "table", "inet", "onecopy") == before
    assert "other" in here.run("nft", "list", "tables")


def test_allow_host_opens_it(
    here: World, host: Host, two: list[GuestRecord], saved: Artifact, run_in: RunIn
) -> None:
    """What was prepared is closed, and stays so."""
    here.onecopy("pool", saved.ref, "1")
    (waiting,) = host.prepared()
    with _running(here, host, saved.ref, "--allow-host") as (guest,):
        assert (guest.allow_host, waiting.allow_host) == (True, False)
        assert guest.pid != waiting.pid
        tried = _tried(
            run_in, guest, ("tcp", str(GATEWAY), PORT), ("tcp", HOST, PORT), ("tcp", OUTSIDE, PORT)
        )
        assert list(tried.values()) == ["host", "host", "outside"]
    with _running(here, host, saved.ref, "-p", "0:80") as (guest,):
        assert guest.pid == waiting.pid
        _assert_closed(_tried(run_in, guest, ("tcp", str(GATEWAY), PORT)))
        ((port, _),) = guest.publish
        fetched = here.run("wget", "-qO-", f"http://127.0.0.1:{port}/")
        assert fetched.strip() == guest.name
    here.onecopy("pool", saved.ref, "0")


#: Hides nft from a command, and takes its right to set rules.
HIDDEN = 'mount --bind /dev/null "$(command -v nft)" && exec "$@"'
CANNOT = {
    "'nft' is not installed": ["unshare", "--mount", "sh", "-c", HIDDEN, "sh"],
    "not permitted": ["setpriv", "--bounding-set=-net_admin"],
}


@pytest.mark.parametrize("reason", CANNOT)
def test_what_cannot_be_enforced_is_refused(here: World, saved: Artifact, reason: str) -> None:
    for change in ("add", "delete"):  # whether it is there or not
        here.run("nft", change, "table", "inet", "onecopy")
    run = [*CANNOT[reason], sys.executable, "-m", "onecopy", "run", saved.ref]
    with pytest.raises(CommandFailed, match=reason) as failed:
        here.run(*run)
    assert "--allow-host" in failed.value.output
    assert failed.value.returncode == Incompatible.exit_code
    here.run(*run, "--allow-host", "--", "true")
