"""report --check: a process that ends between report and check."""

from pathlib import Path

import pytest

from onecopy.errors import NotFound
from onecopy.guest import maps
from onecopy.guest.host import Host
from onecopy.sharing import check
from onecopy.store import Store


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Store(tmp_path / "store"), tmp_path / "run")


def test_it_is_taken_anew(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = iter(["first", "second", "third"])
    monkeypatch.setattr(maps, "report_all", lambda _: next(reports))
    monkeypatch.setattr(check, "read", lambda _: "before")

    def checked(_: object, report: str) -> str:
        if report != "third":
            raise NotFound("no process 1")
        return "adds up"

    monkeypatch.setattr(check, "check", checked)
    found: tuple[object, object] = maps.checked_report(host)
    assert found == ("third", "adds up")


def test_what_was_never_noted_is_told_at_once(host: Host) -> None:
    with pytest.raises(NotFound, match="was not noted"):
        maps.checked_report(host)
