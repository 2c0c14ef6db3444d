"""The rules that close guests, and a kernel that takes them, in a network of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onecopy.errors import Incompatible
from onecopy.vmm import closed_network
from onecopy.vmm.vmm_user import CLOSED, OPEN, User
from tests.conftest import cannot_run

#: Checks rules, which puts none in force. Puts them in force twice, with another name server the
#: second time, and then flushed ones.
_LOADS = """
import json
from onecopy.linux import nftables
from onecopy.vmm import closed_network, vmm_user
from onecopy.vmm.vmm_user import CLOSED, User

found, loads, load = [], [], nftables.load
nftables.load = lambda rules, check=False: (check or loads.append(rules), load(rules, check=check))
vmm_user.why_not = lambda accel: ""
closed_network.check("tcg")
assert not nftables.count_marked(closed_network.TABLE, ""), "it was only to be checked"
for servers in (("127.0.0.53",), ("127.0.0.53",), ("192.0.2.1",), ("192.0.2.1",)):
    closed_network.resolvers = lambda: servers
    closed_network.require(User(CLOSED.start), "")
    rules, mark = closed_network._rules_with_mark(servers)
    found.append([nftables.count_marked(closed_network.TABLE, mark), len(rules), len(loads)])
load("flush chain inet onecopy closed")
closed_network.require(User(CLOSED.start), "")
found.append([nftables.count_marked(closed_network.TABLE, mark), len(rules), len(loads)])
found.append(nftables.count_marked("another", mark))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nameserver 127.0.0.53\noptions edns0\n", ("127.0.0.53",)),
        (
            "# nameserver 192.0.2.9\nnameserver\t192.0.2.1 # x\nnameserver 192.0.2.2",
            ("192.0.2.1", "192.0.2.2"),
        ),
        ("nameserver\nnameserver ::1\nnameserver 1.2.3\nnameserver 0; flush ruleset\n", ()),
        (
            "".join(f"nameserver 192.0.2.{n}\n" for n in range(9)),
            ("192.0.2.0", "192.0.2.1", "192.0.2.2"),
        ),
    ],
)
def test_name_servers(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_bytes(text.encode() + b"\n\xff\n")
    assert closed_network.resolvers(tmp_path) == expected


def test_a_host_without_name_servers(tmp_path: Path) -> None:
    assert closed_network.resolvers(tmp_path) == ()


@pytest.mark.parametrize("user", [None, User(61184), User(OPEN.start)])
def test_who_cannot_be_told_apart_is_refused(user: User | None) -> None:
    with pytest.raises(Incompatible) as refused:
        closed_network.require(user, "why it is none" if user is None else "")
    assert "--allow-host" in refused.value.hint
    assert closed_network.why_not(user, "") == refused.value.message or user is None


def test_the_kernel_takes_the_rules() -> None:
    """Each is there, they are loaded only if need be, and others replace them."""
    if os.geteuid() != 0:
        cannot_run("only root sets rules")
    line = ["unshare", "--net", sys.executable, "-c", _LOADS]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *found, none = json.loads(done.stdout)
    assert all(there == wanted for there, wanted, _ in found)
    assert [loads for *_, loads in found] == [1, 1, 2, 2, 3]
    assert none == 0


def test_ranges_are_apart() -> None:
    assert not set(CLOSED[:: 1 << 20]) & set(OPEN[:: 1 << 20])
    assert CLOSED.stop <= OPEN.start
