"""The kernel's packet filter: load rules with nft(8) and check that they are in force.

The check queries the kernel directly because each start of a guest needs it. That takes 0.1 ms;
running `nft` takes 5 ms or more.

Not here: the rules (vmm/closed_network.py).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from onecopy.subprocesses import run

_NETFILTER = 12
#: struct nlmsghdr, followed by struct nfgenmsg (linux/netlink.h, linux/netfilter/nfnetlink.h).
_HEADER, _GENERAL = struct.Struct("=IHHII"), struct.Struct(">BBH")
_REQUEST, _DUMP, _INTERRUPTED = 0x1, 0x300, 0x10
_ERROR, _DONE = 2, 3
_NEW_RULE, _GET_RULE = 10 << 8 | 6, 10 << 8 | 7
_INET, _RULE_TABLE = 1, 1
_BUFFER_SIZE = 1 << 16


def count_marked(table: str, mark: str) -> int:
    """Count the rules of an inet table whose comment contains ``mark``; needs CAP_NET_ADMIN.

    Returns:
        The number of rules.

    Raises:
        OSError: the kernel refused the query.
    """
    while True:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER
        ) as s:
            s.sendall(_dump_request(table))
            messages = list(_receive_dump(s))
        # If the flag is set, the rules changed during the listing.
        if not any(flags & _INTERRUPTED for _, flags, _ in messages):
            return sum(kind == _NEW_RULE and mark.encode() in body for kind, _, body in messages)


def load(rules: str, *, check: bool = False) -> None:
    """Load ``rules`` atomically.

    Args:
        rules: a script for nft(8).
        check: only ask whether the kernel would accept the rules.

    Raises:
        MissingProgram: nft is not installed.
        CommandFailed: nft refused the rules.
    """
    run(["nft", *(["--check"] if check else []), "-f", "-"], stdin=rules.encode())


def _dump_request(table: str) -> bytes:
    name = table.encode() + b"\0"
    body = _GENERAL.pack(_INET, 0, 0) + struct.pack("=HH", 4 + len(name), _RULE_TABLE) + name
    body += bytes(-len(body) % 4)
    return _HEADER.pack(_HEADER.size + len(body), _GET_RULE, _REQUEST | _DUMP, 0, 0) + body


def _receive_dump(connection: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Yield (type, flags, content) of each message of a dump."""
    while True:
        data = connection.recv(_BUFFER_SIZE)
        while data:
            length, kind, flags, _, _ = _HEADER.unpack_from(data)
            body = data[_HEADER.size : length]
            if kind == _ERROR:
                (number,) = struct.unpack_from("=i", body)
                raise OSError(-number, os.strerror(-number))
            if kind == _DONE:
                return
            yield kind, flags, body
            data = data[(length + 3) & ~3 :]
