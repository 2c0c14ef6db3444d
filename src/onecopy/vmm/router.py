"""The network of a closed guest whose QEMU has no user id of its own: a router per guest.

An ordinary user's guests run as that user. In some containers even root's guests share their user
ids with other programs. Rules by user id (closed_network.py) would affect these programs. So the
guest's network card is a tap device in new user and network namespaces. Rules there let through
what is for the outside, and slirp4netns forwards it: one process, which ends with the guest. QEMU
itself needs no socket.

    guest - QEMU - tap "guest" - [ rules, NAT ] - "tap0" - slirp4netns - the host's sockets

The namespaces do not see the host's addresses. The rules contain those from the time of the guest's
start. slirp4netns publishes ports, on request over its socket in the run directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible, InUse, MissingProgram
from onecopy.linux import child_reaper
from onecopy.linux.files import ROOT
from onecopy.subprocesses import Detached, find_program
from onecopy.vmm.argv import FIRST_ADDRESS, GATEWAY, NAME_SERVER, NETWORK
from onecopy.vmm.closed_network import LINK_LOCAL, METADATA, cannot

#: In the run directory.
SOCKET = "network.sock"
_CHILD = Path(__file__).with_name("router_child.py")
#: The network of slirp4netns, and the addresses of it, of the namespace and of its name server.
_OUTER, _OUTER_SELF, _OUTER_NAMES = "10.0.2.0/24", "10.0.2.100", "10.0.2.3"
#: The gateway's address in QEMU's user-mode network, which clones may have cached (libslirp,
#: special_ethaddr).
_MAC = f"5255{GATEWAY.packed.hex()}"
#: Seconds to wait for each of the two processes.
_PATIENCE = 10.0
_HINT = (
    "this needs user namespaces, /dev/net/tun, and slirp4netns and nftables, which root can "
    "install (apt-get install slirp4netns nftables); or start the guest with --no-network, or "
    "with --allow-host, which lets it reach everything that listens on this host"
)


class Way(msgspec.Struct, frozen=True):
    """The descriptors that QEMU inherits."""

    tap: int
    life: int
    """slirp4netns ends when the last copy of this is closed."""


@contextlib.contextmanager
def way_out(guest: str, folder: Path) -> Iterator[Way]:
    """Create a router for the guest with this address, which lives as long as its QEMU.

    Raises:
        Incompatible: a router is not possible; the message has the reason.
    """
    with contextlib.ExitStack() as ends:
        nft, program, unshare = find_programs()
        plan = {
            "nft": nft,
            "device": "guest",
            "mac": _MAC,
            "addresses": [str(GATEWAY), str(NAME_SERVER)],
            "mask": str(NETWORK.netmask),
            "rules": rules(guest, own_addresses()),
        }
        ours, theirs = socket.socketpair()
        ends.callback(ours.close)
        line = [unshare, "--user", "--map-root-user", "--net", "--", sys.executable, "-I", "-S"]
        line += [str(_CHILD), str(theirs.fileno()), msgspec.json.encode(plan).decode()]
        with theirs:
            child = ends.enter_context(Detached(line, pass_fds=[theirs.fileno()]))
        tap = _receive_tap(ours)
        ends.callback(os.close, tap)
        life = _connect(program, child.pid, folder, ends)
        yield Way(tap, life)


def find_programs() -> list[str]:
    """Find nft, slirp4netns and unshare.

    Returns:
        Their paths, in this order.

    Raises:
        Incompatible: one is missing.
    """
    try:
        return [find_program(name) for name in ("nft", "slirp4netns", "unshare")]
    except MissingProgram as error:
        raise cannot(error.message, _HINT) from error


def _receive_tap(peer: socket.socket) -> int:
    peer.settimeout(_PATIENCE)
    try:
        answer, fds, _, _ = socket.recv_fds(peer, 4096, 1)
    except OSError as error:
        raise cannot(
            f"no network namespace was created: {error.strerror or error}", _HINT
        ) from error
    if not fds:
        reason = (
            answer.decode(errors="replace")
            or "this user may not create namespaces (unshare failed)"
        )
        raise cannot(reason, _HINT)
    return fds[0]


def _connect(program: str, pid: int, folder: Path, ends: contextlib.ExitStack) -> int:
    """Connect a process's namespaces to the outside; return the descriptor that keeps it so."""
    exit_end, life = os.pipe()
    ends.callback(os.close, life)
    ready, ready_end = os.pipe()
    try:
        line = [program, "--configure", "--disable-host-loopback", "--enable-sandbox"]
        line += ["--enable-seccomp", f"--ready-fd={ready_end}", f"--exit-fd={exit_end}"]
        line += [f"--api-socket={folder / SOCKET}", str(pid), "tap0"]
        with Detached(line, pass_fds=[ready_end, exit_end]) as process:
            os.close(ready_end)
            ready_end = -1
            if not select.select([ready], [], [], _PATIENCE)[0] or os.read(ready, 1) != b"1":
                raise cannot(f"slirp4netns did not start: {shlex.join(line)}", _HINT)
            process.keep()
            child_reaper.adopt(process.pid)
    finally:
        for fd in (exit_end, ready, ready_end):
            if fd >= 0:
                os.close(fd)
    return life


def own_addresses(root: Path = ROOT) -> list[str]:
    """List this host's IPv4 addresses except 127.0.0.0/8 (Linux: /proc/net/fib_trie)."""
    text = (root / "proc/net/fib_trie").read_text()
    found = re.findall(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL", text)
    return sorted({each for each in found if not each.startswith("127.")})


def rules(guest: str, host: list[str]) -> str:
    """Build the rules of a guest's router (nft(8)), which block the addresses in ``host``."""
    closed = [LINK_LOCAL, *METADATA, _OUTER, str(NETWORK), "127.0.0.0/8", "224.0.0.0/3", *host]
    refused = "\n".join(f"ip daddr {each} goto refused" for each in closed)
    return f"""
table inet onecopy {{
    chain refused {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx type admin-prohibited
    }}
    chain to {{
        type nat hook prerouting priority -100;
        iifname guest ip daddr {NAME_SERVER} udp dport 53 dnat ip to {_OUTER_NAMES}
        iifname guest ip daddr {NAME_SERVER} tcp dport 53 dnat ip to {_OUTER_NAMES}
        iifname tap0 ip daddr {_OUTER_SELF} dnat ip to {guest}
    }}
    chain through {{
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname tap0 oifname guest accept
        ip daddr {_OUTER_NAMES} udp dport 53 accept
        ip daddr {_OUTER_NAMES} tcp dport 53 accept
        {refused}
        iifname guest oifname tap0 meta nfproto ipv4 accept
    }}
    chain in {{
        type filter hook input priority 0; policy drop;
        ip protocol icmp accept
        goto refused
    }}
    chain from {{
        type nat hook postrouting priority 100;
        oifname tap0 masquerade
    }}
}}
"""


def why_not() -> str:
    """Return the reason why this user's guests cannot be closed; "" after a successful attempt."""
    try:
        rehearse()
    except Incompatible as error:
        return error.message
    return ""


def rehearse() -> None:
    """Create a router and end it.

    Raises:
        Incompatible: a router is not possible.
    """
    import tempfile  # only a plan without guests needs it

    with (
        tempfile.TemporaryDirectory(prefix="onecopy-") as folder,
        way_out(str(FIRST_ADDRESS), Path(folder)),
    ):
        pass


def is_there(folder: Path) -> bool:
    """Whether the guest of a run directory has a router."""
    return (folder / SOCKET).exists()


def publish(folder: Path, ports: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Forward ports of 127.0.0.1 to the guest; 0 means any free port.

    Raises:
        InUse: a port is taken.
        Incompatible: slirp4netns does not answer.
    """
    return tuple((_publish(folder, host, guest), guest) for host, guest in ports)


def _publish(folder: Path, host: int, guest: int) -> int:
    # slirp4netns cannot choose a port. Another process may take the one found here first.
    for _ in range(1 if host else 10):
        port = host or _free_port()
        arguments = {
            "proto": "tcp",
            "host_addr": "127.0.0.1",
            "host_port": port,
            "guest_addr": _OUTER_SELF,
            "guest_port": guest,
        }
        answer = _request(folder, {"execute": "add_hostfwd", "arguments": arguments})
        if "return" in answer:
            return port
    raise InUse(
        f"cannot publish port {port} on 127.0.0.1: slirp4netns answered {answer!r}"[:300],
        users=(),
        hint="use another port, or 0 for any free one",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _request(folder: Path, question: dict[str, object]) -> dict[str, object]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(_PATIENCE)
            peer.connect(str(folder / SOCKET))
            peer.sendall(msgspec.json.encode(question))
            peer.shutdown(socket.SHUT_WR)
            return msgspec.json.decode(peer.recv(4096), type=dict[str, object])
    except (OSError, msgspec.MsgspecError) as error:
        raise Incompatible(
            f"the guest's slirp4netns does not answer: {error}", hint="start the guest again"
        ) from error
