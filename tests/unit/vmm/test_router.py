"""An ordinary user's router, as far as it needs no guest: its rules, and what it is asked for."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from onecopy.errors import Incompatible, InUse
from onecopy.vmm import router
from onecopy.vmm.argv import FIRST_ADDRESS
from tests.conftest import cannot_run

FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.213.48.0/24 2 0 2
        |-- 10.213.48.1
           /32 host LOCAL
        |-- 10.213.48.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        +-- 127.0.0.0/31 1 0 0
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
     |-- 192.0.2.2
        /32 host LOCAL
Local:
     |-- 192.0.2.2
        /32 host LOCAL
"""


def test_the_addresses_of_a_host(tmp_path: Path) -> None:
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/fib_trie").write_text(FIB_TRIE)
    assert router.own_addresses(tmp_path) == ["10.213.48.1", "192.0.2.2"]


def test_the_kernel_takes_the_rules() -> None:
    if os.geteuid() != 0:
        cannot_run("only root sets rules")
    text = router.rules(str(FIRST_ADDRESS), ["192.0.2.1", "192.0.2.2"])
    line = ["unshare", "--net", "nft", "-f", "-"]
    done = subprocess.run(line, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ANSWERS = {
    b'{"return": {"id": 1}}': None,
    b'{"error": {"desc": "bad request: add_hostfwd: slirp_add_hostfwd failed"}}': InUse,
    b"[]": Incompatible,
    b"": Incompatible,
    b"\xff" * 5000: Incompatible,
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_slirp4netns_may_say(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # so that the name is short
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(router.SOCKET)
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):  # of whoever asks, who has read enough
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        while peer.recv(4096):
                            pass
                        peer.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        expected = ANSWERS[answer]
        if expected is None:
            ((port, guest),) = router.publish(Path(), ((0, 80),))
            assert (port > 0, guest) == (True, 80)
        else:
            with pytest.raises(expected):
                router.publish(Path(), ((0, 80),))


def test_a_router_that_is_gone(tmp_path: Path) -> None:
    assert not router.is_there(tmp_path)
    with pytest.raises(Incompatible, match="does not answer"):
        router.publish(tmp_path, ((0, 80),))
