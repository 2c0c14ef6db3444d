"""Closed guests: a VMM can reach the outside, but neither this host nor its other guests.

QEMU's user-mode network opens sockets on the host, and its gateway is the host's 127.0.0.1. Packet
filter rules restrict these sockets by their user id (vmm_user.py), which encodes whether a guest is
closed. So nothing is added or removed per guest, and a compromised QEMU cannot change anything. The
table stays until the host reboots: it affects only those user ids.

The rules do not use connection tracking, so the kernel need not do it for them. A connection that
the VMM opens begins with SYN; its answers to clients of a published port begin with SYN and ACK.

Not here: guests in a bridge, whose frames pass no socket of the host.
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
#: Metadata services of clouds, which may reveal secrets, in addition to link-local ones: Azure,
#: Alibaba, Oracle.
METADATA = ("168.63.129.16", "100.100.100.200", "192.0.0.192")
#: The number of name servers that resolv.conf(5) may have.
_RESOLVERS = 3
_HINT = (
    "install nftables (apt-get install nftables); or start the guest with --no-network, or with "
    "--allow-host, which lets it reach everything that listens on this host"
)


def require(user: User | None, why_not: str) -> None:
    """Require that the traffic of a user is restricted; load the rules if they are missing.

    Args:
        user: the user of the VMM.
        why_not: the reason if there is no such user.

    Raises:
        Incompatible: the traffic cannot be restricted.
    """
    if not is_closed(user):
        raise _no_user(why_not or "this container has too few user ids to distinguish guests")
    rules, mark = _rules_with_mark(resolvers())
    if _is_in_force(rules, mark):
        return
    _load(rules, mark)
    if not _is_in_force(rules, mark):
        raise cannot("nft accepted the rules, but the kernel does not have them", _HINT)


def check(accel: str) -> None:
    """Require that new guests can be closed, without changing the host.

    Args:
        accel: the accelerator of the guests.

    Raises:
        Incompatible: their traffic cannot be restricted.
    """
    if reason := vmm_user.why_not(accel):
        raise _no_user(reason)
    rules, mark = _rules_with_mark(resolvers())
    if not _is_in_force(rules, mark):
        _load(rules, mark, check=True)


def _no_user(why_not: str) -> Incompatible:
    return cannot(why_not, "start the guest with --allow-host or --no-network")


def _load(rules: list[tuple[str, str]], mark: str, *, check: bool = False) -> None:
    try:
        nftables.load(_text(rules, mark), check=check)
    except MissingProgram as error:
        raise cannot(error.message, _HINT) from error
    except CommandFailed as error:
        raise cannot(f"nft refused the rules: {_reason(error)}", _HINT) from error


def is_closed(user: User | None) -> bool:
    """Whether the rules apply to a user's traffic."""
    return user is not None and user.id in CLOSED


def why_not(user: User | None, reason: str) -> str:
    """Return the reason why guests cannot be closed here; "" if they can, with the rules loaded."""
    try:
        require(user, reason)
    except OnecopyError as error:
        return error.message
    return ""


def resolvers(root: Path = ROOT) -> tuple[str, ...]:
    """List the host's IPv4 name servers, which QEMU may query for a guest."""
    found = []
    with contextlib.suppress(OSError):
        lines = (root / "etc/resolv.conf").read_text(errors="replace").splitlines()
        for line in lines:
            words = line.split()
            if words[:1] == ["nameserver"]:
                with contextlib.suppress(ValueError, IndexError):
                    found.append(str(ipaddress.IPv4Address(words[1])))
    return tuple(found[:_RESOLVERS])


def cannot(reason: str, hint: str) -> Incompatible:
    """Build the error for a start that cannot close its guest."""
    return Incompatible(f"cannot prevent the guest from reaching this host: {reason}", hint=hint)


def _reason(error: CommandFailed) -> str:
    lines = [line.strip() for line in error.output.splitlines() if line.strip()]
    return lines[0] if lines else f"exit code {error.returncode}"


def _is_in_force(rules: list[tuple[str, str]], mark: str) -> bool:
    # The kernel's error is dropped, because nft explains it better.
    with contextlib.suppress(OSError):
        return nftables.count_marked(TABLE, mark) == len(rules)
    return False


@cache
def _rules_with_mark(servers: tuple[str, ...]) -> tuple[list[tuple[str, str]], str]:
    """Return the rules and a mark that identifies them, for these name servers."""
    rules = list(_rules(servers))
    return rules, hashlib.sha256(repr(rules).encode()).hexdigest()[:32]


def _rules(servers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (chain, rule) in order; without sets, so that each rule carries the mark itself."""
    # Before the host's own redirections (-100), such as those to containers.
    yield "output", f"meta skuid {CLOSED.start}-{CLOSED.stop - 1} jump closed"
    # Published ports listen on 127.0.0.1 only.
    answer = "tcp flags & (syn | ack) == (syn | ack)"
    yield "closed", f"ip saddr 127.0.0.1 {answer} accept"
    yield "closed", f"{answer} drop"
    yield "closed", "tcp flags & (syn | ack) != syn accept"
    for server in servers:
        yield "closed", f"ip daddr {server} udp dport 53 accept"
        yield "closed", f"ip daddr {server} tcp dport 53 accept"
    # User-mode networks have no IPv6.
    yield "closed", "meta nfproto ipv6 goto refused"
    yield "closed", "meta oiftype loopback goto refused"
    for kind in ("local", "broadcast", "multicast", "anycast"):
        yield "closed", f"fib daddr type {kind} goto refused"
    for address in (LINK_LOCAL, *METADATA):
        yield "closed", f"ip daddr {address} goto refused"
    yield "refused", "meta l4proto tcp reject with tcp reset"
    yield "refused", "reject with icmpx type admin-prohibited"


def _text(rules: list[tuple[str, str]], mark: str) -> str:
    """Format the rules for `nft -f`, which replaces the whole table atomically."""
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{"]
    heads = {"output": "type filter hook output priority -150; policy accept;"}
    for chain in ("refused", "closed", "output"):
        lines += [f"chain {chain} {{", heads.get(chain, "")]
        lines += [f'{rule} comment "{mark}"' for where, rule in rules if where == chain]
        lines.append("}")
    return "\n".join([*lines, "}\n"])
