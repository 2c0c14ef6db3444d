"""The kernel's packet filter: whether our rules are in force, and how they get there (nft(8)).

Whether they are is asked of the kernel itself, since each start of a guest asks: that takes a tenth
of a millisecond, `nft` five and more. Not here: which rules (vmm/closed_network.py).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from onecopy.subprocesses import run

_NETFILTER = 12
#: struct nlmsghdr, and struct nfgenmsg behind it (linux/netlink.h, linux/netfilter/nfnetlink.h).
_HEADER, _GENERAL = struct.Struct("=IHHII"), struct.Struct(">BBH")
_REQUEST, _DUMP, _INTERRUPTED = 0x1, 0x300, 0x10
_ERROR, _DONE = 2, 3
_NEW_RULE, _GET_RULE = 10 << 8 | 6, 10 << 8 | 7
_INET, _RULE_TABLE = 1, 1
_ROOM = 1 << 16


def count_marked(table: str, mark: str) -> int:
    """How many rules of an inet table have ``mark`` in their comment; raise OSError.

    None if there is no such table. That takes CAP_NET_ADMIN.
    """
    while True:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER
        ) as s:
            s.sendall(_question(table))
            answers = list(_answers(s))
        # Else the rules were changed while they were listed.
        if not any(flags & _INTERRUPTED for _, flags, _ in answers):
            return sum(kind == _NEW_RULE and mark.encode() in body for kind, _, body in answers)


def load(rules: str, *, check: bool = False) -> None:
    """Have the kernel take ``rules``, all at once or none; with ``check`` only say if it would.

    Raises MissingProgram, CommandFailed.
    """
    run(["nft", *(["--check"] if check else []), "-f", "-"], stdin=rules.encode())


def _question(table: str) -> bytes:
    name = table.encode() + b"\0"
    body = _GENERAL.pack(_INET, 0, 0) + struct.pack("=HH", 4 + len(name), _RULE_TABLE) + name
    body += bytes(-len(body) % 4)
    return _HEADER.pack(_HEADER.size + len(body), _GET_RULE, _REQUEST | _DUMP, 0, 0) + body


def _answers(asked: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """(type, flags, content) of each message of a dump."""
    while True:
        data = asked.recv(_ROOM)
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
