"""report --check: a process that ends between report and check."""

from pathlib import Path

import pytest

from onecopy.errors import NotFound
from onecopy.guest.observe import accounts
from onecopy.guest.runtime import Runtime
from onecopy.sharing import cross_check
from onecopy.store import Store


@pytest.fixture
def host(tmp_path: Path) -> Runtime:
    return Runtime(Store(tmp_path / "store"), tmp_path / "run")


def test_it_is_taken_anew(host: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = iter(["first", "second", "third"])
    monkeypatch.setattr(accounts, "report_all", lambda _: next(reports))
    monkeypatch.setattr(cross_check, "read", lambda _: "before")

    def checked(_: object, report: str) -> str:
        if report != "third":
            raise NotFound("no process 1")
        return "adds up"

    monkeypatch.setattr(cross_check, "check", checked)
    found: tuple[object, object] = accounts.checked_report(host)
    assert found == ("third", "adds up")


def test_what_was_never_noted_is_told_at_once(host: Runtime) -> None:
    with pytest.raises(NotFound, match="was not recorded"):
        accounts.checked_report(host)
