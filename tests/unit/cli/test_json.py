"""docs/json.md names every field that commands print, and no other.

The page has one table for each object, under a heading `### command: object`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from msgspec.structs import fields

from onecopy.cli import ls_cmd, onecopy
from onecopy.cli.save_cmd import document
from onecopy.demo import show
from onecopy.demo.measure import Measured
from onecopy.errors import GuestFailed
from onecopy.guest.end import Ended
from onecopy.guest.lifecycle.batch import Started
from onecopy.guest.lifecycle.disks import OwnDisk
from onecopy.guest.lifecycle.pool import Pool
from onecopy.guest.lifecycle.save import Saved
from onecopy.guest.machine import Generator, MappedSegment, SystemConfig
from onecopy.guest.observe import doctor
from onecopy.guest.observe.advise import Advised, Step
from onecopy.guest.observe.inspect import describe, describe_fully
from onecopy.guest.pagecache.pin import Pinned
from onecopy.guest.pagecache.preload import Warmed
from onecopy.guest.run_directory import Attached, Device, GuestDisk, run_root
from onecopy.images.kernel import KernelConfig
from onecopy.sharing import ksm_settings, report
from onecopy.sharing.account import GuestAccount, SegmentUse
from onecopy.sharing.advice import FileFound, Looked, Way, advise
from onecopy.sharing.cross_check import LINES, Check
from onecopy.sharing.forecast import Forecast, Profile, Work
from onecopy.sharing.survey import LeftOut, Survey
from onecopy.store import Store
from tests.unit.guest_kit import record
from tests.unit.store_kit import put

PAGE = Path(__file__).parents[3] / "docs/json.md"
GUEST = record("web")


def _documented() -> dict[str, list[str]]:
    """Heading -> fields of the table under it."""
    found = {}
    for part in re.split(r"^### ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        heading, _, rest = part.partition("\n")
        found[heading] = re.findall(r"^\| `(\w+)` \|", rest, flags=re.MULTILINE)
    return found


def _struct(kind: type[msgspec.Struct]) -> list[str]:
    return list(kind.__struct_fields__)


def _printed(tmp_path: Path) -> dict[str, list[str]]:
    """Heading -> fields, from what the commands print."""
    store = Store(tmp_path)
    artifact = put(store)
    full = describe_fully(store, artifact)
    batch = Measured("booted", "tcg: asked for", 1, 1, 1.0, (1.0,), 1, 1)
    sheet = report.Report((), ()).to_json()
    return {
        "ps: guest": list(msgspec.to_builtins(GUEST)),
        "ps: segment of a guest": _struct(Attached),
        "ps: range of a segment": _struct(Device),
        "ps: end of a guest": _struct(Ended),
        "ps: disk of a guest": _struct(GuestDisk),
        "disks: disk": [field.name for field in fields(OwnDisk)],
        "ls: artifact": list(describe(store, artifact)),
        "pool: pool": [field.name for field in fields(Pool)],
        "ksm: status": [*(field.name for field in fields(ksm_settings.Status)), "gain"],
        "ksm: changed setting": [field.name for field in fields(ksm_settings.Changed)],
        "ksm: guest": [field.name for field in fields(ksm_settings.GuestMerging)],
        "preload: blob": [field.name for field in fields(Warmed)],
        "preload: pinned": [field.name for field in fields(Pinned)],
        "inspect: artifact": [key for key in full if key not in describe(store, artifact)],
        "inspect: layer": list(full["layers"][0]),
        "inspect: config of a system": _struct(SystemConfig),
        "inspect: generator of a system": _struct(Generator),
        "save: document": list(document(Saved(artifact, 1, 1, 0.1))),
        "inspect: segment of a system": _struct(MappedSegment),
        "inspect: config of a kernel": _struct(KernelConfig),
        "inspect: guest": ["account"],
        "report: document": [*sheet, "check"],
        "report: check": [field.name for field in fields(Check)],
        "report: guest": [field.name for field in fields(GuestAccount)],
        "report: segment": [field.name for field in fields(SegmentUse)],
        "report: blob": [field.name for field in fields(report.Blob)],
        "report: totals": list(report.Report((), ()).totals),
        "advise: document": [*_advised().to_json(), "built"],
        "advise: guest": [field.name for field in fields(Looked)],
        "advise: way": [field.name for field in fields(Way)],
        "advise: file": [field.name for field in fields(FileFound)],
        "advise: left out": [field.name for field in fields(LeftOut)],
        "advise: step": [field.name for field in fields(Step)],
        "plan: document": [*(field.name for field in fields(Forecast)), "profile"],
        "plan: profile": [field.name for field in fields(Profile)],
        "plan: work": [field.name for field in fields(Work)],
        "doctor: finding": ["check", "state", "says"],
        "run: document": ["guests", "failures"],
        "run: failure": ["name", "error", "message"],
        "demo: document": list(show.as_json("tcg: why", [batch, batch])),
    }


def _advised() -> Advised:
    return Advised(Survey(advise([]), (), 0.0, 0), ())


def test_the_page_names_what_is_printed(tmp_path: Path) -> None:
    printed, documented = _printed(tmp_path), _documented()
    # Configs of segments are what builds write: see the next test.
    documented.pop("inspect: config of a segment")
    assert documented.keys() == printed.keys()
    assert list(ls_cmd.FIELDS) == printed["ls: artifact"]
    for heading, names in printed.items():
        assert sorted(documented[heading]) == sorted(names), heading


def test_config_of_a_built_segment(tmp_path: Path) -> None:
    from onecopy.images.build import build_segment
    from onecopy.model import Reference

    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_text("content")
    store = Store(tmp_path / "store")
    artifact = build_segment(store, Reference("a"), f"dir:{tmp_path / 'source'}")
    assert sorted(json.loads(artifact.config)) == sorted(
        _documented()["inspect: config of a segment"]
    )


def test_report_s_meanings_are_the_columns_own() -> None:
    text = " ".join(PAGE.read_text().split())
    for column in (*report.COLUMNS, *report.BLOB_COLUMNS):
        assert f"| `{column.key}` | {column.counts}" in text, column.key
    for key, _, counts in LINES[:-3]:
        assert f"| `{key}` | {counts}" in text, key
    assert f"`version` | {report.JSON_VERSION}" in text


def test_run_prints_these_fields(capsys: pytest.CaptureFixture[str]) -> None:
    from onecopy.cli.starting import print_started

    started = Started((GUEST,), (("b", GuestFailed("it broke")),))
    assert print_started((started, 0), as_json=True, quiet=False) == GuestFailed.exit_code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(document) == _documented()["run: document"]
    assert list(document["failures"][0]) == _documented()["run: failure"]
    assert document["guests"] == [json.loads(msgspec.json.encode(GUEST))]


def test_doctor_prints_these_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checks run in tests/vm: they need a kernel."""
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path))
    found = [doctor.Finding("one", "limited", "so"), doctor.Finding("two", "missing", "so")]
    monkeypatch.setattr(doctor, "examine", lambda *_: found)
    command = onecopy.get_command(click.Context(onecopy), "doctor")
    assert command is not None
    assert command.main(["--json"], standalone_mode=False) == 1
    document = json.loads(capsys.readouterr().out)
    assert [list(each) for each in document] == [_documented()["doctor: finding"]] * 2
    shutil.rmtree(run_root(Store(tmp_path)), ignore_errors=True)
