"""A short soak, one wave of each kind; and that it sees what it is for."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.guest.runtime import Runtime
from tests.conftest import cannot_run
from tests.soak.campaign import KINDS, Campaign
from tests.soak.remains import Remains
from tests.soak.setup import soaked


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    if os.geteuid() != 0:
        cannot_run("Debian roots are built by root only")
    home = tmp_path_factory.mktemp("soak") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECOPY_HOME", str(home))
        with soaked(home) as made:
            yield made


def test_a_wave_of_each_kind(host: Runtime) -> None:
    campaign = Campaign(host, seed=1, wave=3)
    for kind in KINDS:
        campaign.turn(kind)
    assert campaign.waves.total() == len(KINDS)
    # Of the whole, half of the dying (of three: one), both of what they came from, and all again.
    assert campaign.answers >= 3 + 1 + 4 + 3 + 3
    assert campaign.forked.total() == 3


def test_what_is_left_is_seen(host: Runtime, tmp_path: Path) -> None:
    before = Remains.look(host)
    Remains.look(host).require(before)
    with subprocess.Popen(["sleep", "60"], cwd=host.run) as child:
        with pytest.raises(AssertionError, match="processes left"):
            Remains.look(host).require(before)
        child.terminate()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(host.run / "left.sock"))
        with pytest.raises(AssertionError, match="run left"):
            Remains.look(host).require(before)
        (host.run / "left.sock").unlink()
        with pytest.raises(AssertionError, match="sockets left"):
            Remains.look(host).require(before)
    blob = host.store.root / "blobs" / "sha256" / "left"
    blob.write_bytes(b"left")
    with pytest.raises(AssertionError, match="blobs left"):
        Remains.look(host).require(before)
    blob.unlink()
    Remains.look(host).require(before)
