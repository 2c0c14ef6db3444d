"""Closed guests: what a VMM sends reaches the outside, and nothing of this host or its guests.

QEMU's user-mode network opens sockets on the host, so its gateway is the host's 127.0.0.1. Rules of
the packet filter hold such sockets back by the number of their user (vmm_user.py), which says
whether a guest is closed: there is nothing to add or remove with a guest, and what a guest makes of
its QEMU changes nothing. The table stays until the host is booted: it concerns nobody but those
users.

The rules look at no state of connections: the kernel need not track any for them. A connection of
the VMM's own begins with a SYN, and what it says to a published port's client with SYN and ACK. Not
here: what guests in a bridge reach, whose frames pass no socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from onecopy.errors import CommandFailed, Incompatible, MissingProgram, OnecopyError
from onecopy.linux import nftables
from onecopy.linux.files import ROOT
from onecopy.vmm import vmm_user
from onecopy.vmm.vmm_user import CLOSED, User

TABLE = "onecopy"
LINK_LOCAL = "169.254.0.0/16"
#: What clouds tell their machines about themselves, secrets included, beside the link-local ones:
#: Azure, Alibaba, Oracle.
METADATA = ("168.63.129.16", "100.100.100.200", "192.0.0.192")
#: How many name servers resolv.conf(5) may have.
_RESOLVERS = 3
_HINT = (
    "install nftables (apt-get install nftables); or start the guest with --no-network, or with "
    "--allow-host, which lets it reach all that listens on this host"
)


def require(user: User | None, why_not: str) -> None:
    """Raise Incompatible unless what ``user`` sends is held back; ``why_not`` if it is none.

    Rules that somebody has flushed are put back.
    """
    if not is_closed(user):
        raise _no_number(why_not or "this container has too few user numbers to tell guests by")
    rules, mark = _marked(resolvers())
    if _is_in_force(rules, mark):
        return
    _load(rules, mark)
    if not _is_in_force(rules, mark):
        raise cannot("nft took the rules, and the kernel has them not", _HINT)


def check(accel: str) -> None:
    """Raise Incompatible if new guests cannot be closed; nothing of the host changes."""
    if reason := vmm_user.why_not(accel):
        raise _no_number(reason)
    rules, mark = _marked(resolvers())
    if not _is_in_force(rules, mark):
        _load(rules, mark, check=True)


def _no_number(why_not: str) -> Incompatible:
    return cannot(why_not, "start it with --allow-host, or with --no-network")


def _load(rules: list[tuple[str, str]], mark: str, *, check: bool = False) -> None:
    try:
        nftables.load(_text(rules, mark), check=check)
    except MissingProgram as error:
        raise cannot(error.message, _HINT) from error
    except CommandFailed as error:
        raise cannot(f"nft refused the rules: {_reason(error)}", _HINT) from error


def is_closed(user: User | None) -> bool:
    """Whether the rules, where they are in force, hold back what this user sends."""
    return user is not None and user.id in CLOSED


def why_not(user: User | None, reason: str) -> str:
    """Why guests cannot be closed here; "" if they can, and then the rules are in force."""
    try:
        require(user, reason)
    except OnecopyError as error:
        return error.message
    return ""


def resolvers(root: Path = ROOT) -> tuple[str, ...]:
    """The name servers of this host that QEMU may ask for a guest, which are IPv4 ones."""
    found = []
    with contextlib.suppress(OSError):
        lines = (root / "etc/resolv.conf").read_text(errors="replace").splitlines()
        for line in lines:
            words = line.split()
            if words[:1] == ["nameserver"]:
                with contextlib.suppress(ValueError, IndexError):
                    found.append(str(ipaddress.IPv4Address(words[1])))
    return tuple(found[:_RESOLVERS])


def cannot(why: str, hint: str) -> Incompatible:
    """What a start ends with that cannot close its guest."""
    return Incompatible(f"this host cannot keep a guest from reaching it: {why}", hint=hint)


def _reason(error: CommandFailed) -> str:
    lines = [line.strip() for line in error.output.splitlines() if line.strip()]
    return lines[0] if lines else f"exit code {error.returncode}"


def _is_in_force(rules: list[tuple[str, str]], mark: str) -> bool:
    # nft says better than the kernel what is wrong.
    with contextlib.suppress(OSError):
        return nftables.count_marked(TABLE, mark) == len(rules)
    return False


@cache
def _marked(servers: tuple[str, ...]) -> tuple[list[tuple[str, str]], str]:
    """The rules, and what tells them from others, such as those for other name servers."""
    rules = list(_rules(servers))
    return rules, hashlib.sha256(repr(rules).encode()).hexdigest()[:32]


def _rules(servers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(chain, rule), in order; no sets, so that each rule is as a whole where its mark is."""
    # Before the host's own rules redirect anything (-100): to a container, for example.
    yield "output", f"meta skuid {CLOSED.start}-{CLOSED.stop - 1} jump closed"
    # It listens on 127.0.0.1 alone, which is where ports are published.
    answer = "tcp flags & (syn | ack) == (syn | ack)"
    yield "closed", f"ip saddr 127.0.0.1 {answer} accept"
    yield "closed", f"{answer} drop"
    yield "closed", "tcp flags & (syn | ack) != syn accept"
    for server in servers:
        yield "closed", f"ip daddr {server} udp dport 53 accept"
        yield "closed", f"ip daddr {server} tcp dport 53 accept"
    # User-mode networks have none.
    yield "closed", "meta nfproto ipv6 goto refused"
    yield "closed", "meta oiftype loopback goto refused"
    for kind in ("local", "broadcast", "multicast", "anycast"):
        yield "closed", f"fib daddr type {kind} goto refused"
    for address in (LINK_LOCAL, *METADATA):
        yield "closed", f"ip daddr {address} goto refused"
    yield "refused", "meta l4proto tcp reject with tcp reset"
    yield "refused", "reject with icmpx type admin-prohibited"


def _text(rules: list[tuple[str, str]], mark: str) -> str:
    """For `nft -f`, which replaces the whole table in one step."""
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    heads = {"output": "type filter hook output priority -150; policy accept;"}
    for chain in ("refused", "closed", "output"):
        lines += [f"chain {chain} {{", heads.get(chain, "")]
        lines += [f'{rule} comment "{mark}"' for where, rule in rules if where == chain]
        lines.append("}")
    return "\n".join([*lines, "}\n"])
