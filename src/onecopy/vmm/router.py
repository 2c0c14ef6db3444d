"""The way out of a closed guest whose QEMU has no user of its own: a router of the guest's.

An ordinary user's guests are that user, and in some containers root's have numbers that others
have, too: rules that go by users (closed_network.py) would hit these. So the guest's card is a tap
device in new namespaces of user and network, where rules of our own let through what is for the
outside, and slirp4netns takes it there: one process, which ends with the guest. QEMU itself needs
no socket.

    guest - QEMU - tap "guest" - [ rules, NAT ] - "tap0" - slirp4netns - the host's sockets

What the namespaces cannot see is which addresses the host has: the rules have those of the guest's
start. Published ports are slirp4netns's, asked for over its socket in the run folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible, InUse, MissingProgram
from onecopy.linux import child_reaper
from onecopy.linux.files import ROOT
from onecopy.subprocesses import Detached, find_program
from onecopy.vmm.argv import FIRST_ADDRESS, GATEWAY, NAME_SERVER, NETWORK
from onecopy.vmm.closed_network import LINK_LOCAL, METADATA, cannot

#: In the run folder.
SOCKET = "network.sock"
_CHILD = Path(__file__).with_name("router_child.py")
#: slirp4netns's own network, in which it, the namespace and its name server have these addresses.
_OUTER, _OUTER_SELF, _OUTER_NAMES = "10.0.2.0/24", "10.0.2.100", "10.0.2.3"
#: The gateway's in QEMU's user-mode network, which clones may know (libslirp, special_ethaddr).
_MAC = f"5255{GATEWAY.packed.hex()}"
#: Seconds that each of the two processes may take.
_PATIENCE = 10.0
_HINT = (
    "that takes user namespaces, /dev/net/tun, and slirp4netns and nftables, which root installs "
    "(apt-get install slirp4netns nftables); or start the guest with --no-network, or with "
    "--allow-host, which lets it reach all that listens on this host"
)


class Way(msgspec.Struct, frozen=True):
    """The descriptors that QEMU inherits."""

    tap: int
    life: int
    """slirp4netns ends when its last copy is closed."""


@contextlib.contextmanager
def way_out(guest: str, folder: Path) -> Iterator[Way]:
    """A router for the guest with this address, as long as QEMU lives that inherits the way.

    Raises Incompatible with the reason, and what to do.
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
        line += [str(_CHILD), str(theirs.fileno()), json.dumps(plan)]
        with theirs:
            child = ends.enter_context(Detached(line, pass_fds=[theirs.fileno()]))
        tap = _received(ours)
        ends.callback(os.close, tap)
        life = _connected(program, child.pid, folder, ends)
        yield Way(tap, life)


def find_programs() -> list[str]:
    """Paths of nft, slirp4netns and unshare; raise Incompatible for one that is missing."""
    try:
        return [find_program(name) for name in ("nft", "slirp4netns", "unshare")]
    except MissingProgram as error:
        raise cannot(error.message, _HINT) from error


def _received(peer: socket.socket) -> int:
    peer.settimeout(_PATIENCE)
    try:
        said, fds, _, _ = socket.recv_fds(peer, 4096, 1)
    except OSError as error:
        raise cannot(f"no network namespace was made: {error.strerror or error}", _HINT) from error
    if not fds:
        why = said.decode(errors="replace") or "this user may make no namespaces (unshare failed)"
        raise cannot(why, _HINT)
    return fds[0]


def _connected(program: str, pid: int, folder: Path, ends: contextlib.ExitStack) -> int:
    """Connect the namespaces of a process to the outside; what QEMU holds the connection by."""
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
                raise cannot(f"it does not start: {shlex.join(line)}", _HINT)
            process.keep()
            child_reaper.adopt(process.pid)
    finally:
        for fd in (exit_end, ready, ready_end):
            if fd >= 0:
                os.close(fd)
    return life


def own_addresses(root: Path = ROOT) -> list[str]:
    """This host's IPv4 addresses, those of 127.0.0.0/8 apart (Linux: /proc/net/fib_trie)."""
    text = (root / "proc/net/fib_trie").read_text()
    found = re.findall(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL", text)
    return sorted({each for each in found if not each.startswith("127.")})


def rules(guest: str, host: list[str]) -> str:
    """The rules of a guest's router (nft(8)), which keep it from addresses of this ``host``."""
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
    """Why this user's guests cannot be closed; "" if they can, which is tried."""
    try:
        rehearse()
    except Incompatible as error:
        return error.message
    return ""


def rehearse() -> None:
    """Make a router and let it end; raise Incompatible."""
    with (
        tempfile.TemporaryDirectory(prefix="onecopy-") as folder,
        way_out(str(FIRST_ADDRESS), Path(folder)),
    ):
        pass


def is_there(folder: Path) -> bool:
    """Whether the guest of a run folder has a router."""
    return (folder / SOCKET).exists()


def publish(folder: Path, ports: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Forward ports of 127.0.0.1 to the guest, any free one for 0; raise InUse, Incompatible."""
    return tuple((_published(folder, host, guest), guest) for host, guest in ports)


def _published(folder: Path, host: int, guest: int) -> int:
    # slirp4netns finds no free port by itself: somebody may take what was found before it does.
    for _ in range(1 if host else 10):
        port = host or _free_port()
        arguments = {
            "proto": "tcp",
            "host_addr": "127.0.0.1",
            "host_port": port,
            "guest_addr": _OUTER_SELF,
            "guest_port": guest,
        }
        said = _asked(folder, {"execute": "add_hostfwd", "arguments": arguments})
        if "return" in said:
            return port
    raise InUse(
        f"port {port} on 127.0.0.1 cannot be published: slirp4netns says {said!r}"[:300],
        users=(),
        hint="give another port, or 0 for any free one",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _asked(folder: Path, question: dict[str, object]) -> dict[str, object]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(_PATIENCE)
            peer.connect(str(folder / SOCKET))
            peer.sendall(json.dumps(question).encode())
            peer.shutdown(socket.SHUT_WR)
            return msgspec.json.decode(peer.recv(4096), type=dict[str, object])
    except (OSError, msgspec.MsgspecError) as error:
        raise Incompatible(
            f"the guest's slirp4netns does not answer: {error}", hint="start the guest again"
        ) from error
