"""A short campaign, and that it sees what it is for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onecopy.store import collect, workspace
from tests.crash.campaign import Campaign, total


@contextmanager
def campaign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Campaign]:
    monkeypatch.setenv("ONECOPY_HOME", "put back at the end")
    made = Campaign(folder, seed=1)
    try:
        yield made
    finally:
        made.abandon()


def test_a_few_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with campaign(tmp_path, monkeypatch) as short:
        while short.kills < 25:
            short.turn()
        short.end()
        sums = total(short.tally)
        assert sums["killed"] == 25
        assert sums["old"] + sums["new"] <= 25


def test_remains_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "sweep", lambda _: None)
    with campaign(tmp_path, monkeypatch) as short, pytest.raises(AssertionError):
        while short.kills < 200:
            short.turn()


def test_blobs_that_nobody_wants_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "collect", lambda _: [])
    with campaign(tmp_path, monkeypatch) as short, pytest.raises(AssertionError):
        while short.kills < 200:
            short.turn()
