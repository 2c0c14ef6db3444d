"""Guests in a bridge of the host, each with an address of its network, and guests without one.

Not here: user-mode networks and published ports (test_lifecycle.py, test_identity.py).
"""

from __future__ import annotations

import secrets
import select
import shlex
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from onecopy.errors import InvalidInput, NotFound, NotPermitted
from onecopy.guest.runtime import Runtime
from onecopy.linux.tap import open_tap
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from onecopy.vmm.argv import NAME_SERVER
from tests.conftest import cannot_run
from tests.unit.other_user import as_nobody
from tests.vm.conftest import Boot, RunIn
from tests.vm.guests import Guests

#: A network that nobody else has here. None of RFC 5737: closed-off hosts reach mirrors by such
#: addresses, and other tests need them meanwhile.
NET = "10.213.47"


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[str]:
    """A bridge with a DHCP server behind it."""
    name = f"octest{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True)
    if made.returncode:
        cannot_run(f"no bridge can be made here: {made.stderr.decode()}")
    config = tmp_path / "udhcpd.conf"
    leases = tmp_path / "leases"
    leases.touch()
    config.write_text(
        f"start {NET}.10\nend {NET}.99\ninterface {name}\nlease_file {leases}\n"
        f"pidfile {tmp_path}/pid\noption subnet 255.255.255.0\noption router {NET}.1\n"
        f"option dns {NET}.1\n"
    )
    try:
        for argv in (["addr", "add", f"{NET}.1/24", "dev", name], ["link", "set", name, "up"]):
            subprocess.run(["ip", *argv], check=True)
        # It handles one request at a time, and each new client would hold up the others for 2 s.
        serve = ["busybox", "udhcpd", "-f", "-a", "200", str(config)]
        server = subprocess.Popen(serve, stderr=subprocess.DEVNULL)
        try:
            yield name
        finally:
            server.terminate()
            server.wait()
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


def ports(bridge: str) -> list[str]:
    return [path.name for path in Path(f"/sys/class/net/{bridge}/brif").iterdir()]


def test_clones_in_a_bridge(saved: Artifact, bridge: str, guests: Guests) -> None:
    left, right = guests.clone(saved, 2, bridge=bridge)
    assert len(ports(bridge)) == 2
    assert left.record.mac != right.record.mac
    for guest, other in ((left, right), (right, left)):
        assert guest.record.address.startswith(f"{NET}.")
        # From the host, and from each other.
        with urllib.request.urlopen(f"http://{guest.record.address}/", timeout=60) as answer:
            assert answer.read().decode().strip() == guest.name
        done = guest.exec(["wget", "-qO-", f"http://{other.record.address}/"])
        assert done.text.strip() == other.name
    guests.end()
    assert not ports(bridge)


def test_cold_guests_in_a_bridge(
    boot: Boot, busybox_root: Artifact, bridge: str, run_in: RunIn
) -> None:
    guest = boot(busybox_root, bridge=bridge, command="")
    assert guest.address.startswith(f"{NET}.")
    shown = run_in(guest, "busybox", "ifconfig", "eth0").text
    assert f"inet addr:{guest.address} " in shown
    done = run_in(guest, "busybox", "ping", "-c", "1", f"{NET}.1")
    assert done.exit_code == 0, done


def test_a_system_that_was_saved_in_a_bridge(
    host: Runtime, guests: Guests, busybox_root: Artifact, bridge: str, run_in: RunIn
) -> None:
    """Its clones in a network of their own keep nothing of what DHCP gave."""
    guest = guests.boot(busybox_root, bridge=bridge).record
    clone = guests.clone(guests.save(guest, "bridged").artifact, name="homely")[0].record
    try:
        assert not clone.address.startswith(f"{NET}.")
        assert f"inet addr:{clone.address} " in run_in(clone, "busybox", "ifconfig", "eth0").text
        servers = run_in(clone, "busybox", "cat", "/etc/resolv.conf").text
        assert servers.split() == ["nameserver", str(NAME_SERVER)]
        assert "udhcpc" not in run_in(clone, "busybox", "ps").text
    finally:
        host.end(clone)


#: Says something over a connection to a server ten times a second, and over one to itself; of a
#: server that is lost it makes a note, and connects again.
TALKS = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", 0))
mine = socket.create_connection(server.getsockname())
other, _ = server.accept()
def connected():
    return socket.create_connection((sys.argv[1], int(sys.argv[2])))
talk = connected()
while True:
    mine.sendall(b"x")
    assert other.recv(1) == b"x"
    try:
        talk.sendall(socket.gethostname().encode() + b"\\n")
    except OSError as error:
        open("/tmp/lost", "a").write(f"{type(error).__name__}\\n")
        talk = connected()
    time.sleep(0.1)
"""


def heard(connection: socket.socket, name: str) -> None:
    """Wait until ``name`` is said there."""
    connection.settimeout(60)
    said = b""
    while name.encode() + b"\n" not in said:
        data = connection.recv(1 << 16)
        assert data, f"the connection ended after {said[-80:]!r}"
        said = data if len(said) > 1 << 16 else said + data


def frames(taken: socket.socket) -> list[bytes]:
    """All that has been in the bridge."""
    found = []
    while select.select([taken], [], [], 0)[0]:
        found.append(taken.recv(1 << 16))
    return found


def test_connections_are_reset_in_the_clone_only(
    host: Runtime, guests: Guests, python_root: Artifact, bridge: str, run_in: RunIn
) -> None:
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
    server = socket.create_server((f"{NET}.1", 0))
    with closing(server), closing(capture), ExitStack() as kept:
        capture.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        capture.bind((bridge, 0))
        port = server.getsockname()[1]
        command = f"exec python3 -c {shlex.quote(TALKS)} {NET}.1 {port}"
        guest = guests.boot(python_root, bridge=bridge, command=command, memory=192 * MIB).record
        server.settimeout(60)
        first = kept.enter_context(closing(server.accept()[0]))
        heard(first, guest.name)
        there = learned(bridge, guest.mac)
        assert there
        system = guests.save(guest, "talks").artifact
        frames(capture)
        clone = guests.clone(system, name="talks-1", bridge=bridge)[0].record
        try:
            second = kept.enter_context(closing(server.accept()[0]))
            assert second.getpeername()[0] == clone.address != guest.address
            heard(second, clone.name)
            # The guest's own goes on, and nothing of the clone's has come from its address.
            heard(first, guest.name)
            assert run_in(guest, "cat", "/tmp/lost").exit_code
            assert run_in(clone, "cat", "/tmp/lost").text == "ConnectionAbortedError\n"
            seen = frames(capture)
            mac, address = (
                bytes.fromhex(clone.mac.replace(":", "")),
                socket.inet_aton(guest.address),
            )
            theirs = [frame for frame in seen if frame[6:12] == mac]
            assert theirs
            assert not [frame for frame in theirs if address in (frame[26:30], frame[28:32])]
            resets = [each for each in seen if each[12:14] == b"\x08\0" and is_reset(each)]
            assert not resets
            # The bridge sends what is for the guest to where it was.
            assert learned(bridge, guest.mac) == there
        finally:
            host.end(clone)
            host.store.remove(Reference("talks"))


def learned(bridge: str, mac: str) -> list[str]:
    """The ports behind which a bridge has seen an address."""
    shown = subprocess.run(["bridge", "fdb", "show", "br", bridge], capture_output=True, check=True)
    return [line.split()[2] for line in shown.stdout.decode().splitlines() if line.startswith(mac)]


def is_reset(frame: bytes) -> bool:
    """Whether an IPv4 frame is a TCP segment with RST."""
    header = 14 + 4 * (frame[14] & 15)
    return frame[23] == socket.IPPROTO_TCP and bool(frame[header + 13] & 4)


def test_an_ordinary_user_and_a_bridge(bridge: str) -> None:
    def told() -> str:
        try:
            open_tap(bridge)
        except NotPermitted as error:
            return error.message
        return "nothing"

    assert "only root" in as_nobody(told)
    assert not ports(bridge)


def test_what_is_no_network(saved: Artifact, guests: Guests, busybox_root: Artifact) -> None:
    with pytest.raises(NotFound, match="no bridge"):
        guests.clone(saved, bridge="nowhere0")
    with pytest.raises(InvalidInput, match="no network card"):
        guests.boot(busybox_root, network=False, publish=[(0, 80)])
    with pytest.raises(InvalidInput, match="can be published"):
        guests.clone(saved, bridge="nowhere0", publish=[(0, 80)])


def test_a_guest_without_a_network(boot: Boot, busybox_root: Artifact, run_in: RunIn) -> None:
    guest = boot(busybox_root, network=False)
    assert (guest.mac, guest.address) == ("", "")
    assert run_in(guest, "ls", "/sys/class/net").stdout.decode().split() == ["lo"]
