"""Fixtures of the tests of fork servers (fork_kit.py)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from onecopy.vmm import fork_registry, fork_server
from onecopy.vmm.fork_server import ForkServer
from tests.unit.vmm.fork_kit import servers


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork_server.library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in place of /run/onecopy."""
    base = tmp_path / "base"
    base.mkdir(mode=0o700)
    monkeypatch.setattr(fork_registry, "make_run_base", lambda: base)
    return base


@pytest.fixture
def server(library: Path, base: Path) -> Iterator[ForkServer]:
    yield ForkServer(library, domain=str(base))
    for pid in servers(base):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
