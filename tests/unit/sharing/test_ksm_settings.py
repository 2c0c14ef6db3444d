"""KSM turned on, tuned and put back: on a recorded tree, and what a killed command leaves."""

import json
import shutil
from pathlib import Path

import pytest

from onecopy.errors import Incompatible, InsufficientResources, InvalidInput
from onecopy.linux.counters import ksm
from onecopy.model import PAGE_SIZE
from onecopy.sharing import ksm_settings
from onecopy.sharing.ksm_settings import Changed
from tests.unit.ksm_tree import everything, plain, sysfs


def test_on_and_off(root: Path) -> None:
    before = everything(root)
    ksm_settings.turn_on({"advisor_mode": "scan-time"}, root)
    # Which chooses another number of pages.
    sysfs(root, "pages_to_scan").write_text("5000\n")
    ksm_settings.tune({"sleep_millisecs": "50"}, root)
    ksm_settings.tune({"sleep_millisecs": "70"}, root)
    found = ksm_settings.status([], root)
    assert (found.run, found.sleep_millisecs) == (1, 70)
    assert found.changed == {
        "advisor_mode": Changed("none", "scan-time"),
        "pages_to_scan": Changed("100", None),
        "run": Changed("0", "1"),
        "sleep_millisecs": Changed("20", "70"),
    }
    assert ksm_settings.turn_off(root) == []
    assert everything(root) == plain(before)
    assert ksm_settings.status([], root).changed == {}
    assert sorted(path.name for path in (root / "run/onecopy").iterdir()) == ["ksm.lock"]
    assert ksm_settings.turn_off(root) == []


def test_what_somebody_else_has_set_is_left(root: Path) -> None:
    ksm_settings.turn_on({"pages_to_scan": "300"}, root)
    sysfs(root, "pages_to_scan").write_text("7\n")
    assert ksm_settings.turn_off(root) == ["pages_to_scan"]
    assert ksm.setting("pages_to_scan", root) == "7" and ksm.setting("run", root) == "0"


def test_a_killed_command_is_put_back_by_the_next(root: Path) -> None:
    # It ended after the note and the first of two settings.
    folder = root / "run/onecopy"
    folder.mkdir(parents=True)
    note = {"pages_to_scan": {"found": "100", "set": "300"}, "run": {"found": "0", "set": "1"}}
    (folder / "ksm.json").write_text(json.dumps(note))
    sysfs(root, "pages_to_scan").write_text("300\n")
    assert set(ksm_settings.status([], root).changed) == {"pages_to_scan", "run"}
    ksm_settings.tune({"pages_to_scan": "500"}, root)
    assert ksm_settings.turn_off(root) == []
    assert (ksm.setting("pages_to_scan", root), ksm.setting("run", root)) == ("100", "0")


def test_unmerging(root: Path) -> None:
    ksm_settings.turn_on({}, root)
    sysfs(root, "pages_sharing").write_text("1000\n")
    sysfs(root, "ksm_zero_pages").write_text("24\n")
    assert ksm_settings.status([], root).unmerge == 1024 * PAGE_SIZE
    (root / "proc/meminfo").write_text("MemAvailable:    4000 kB\n")
    with pytest.raises(InsufficientResources) as caught:
        ksm_settings.turn_off(root, unmerge=True)
    assert (caught.value.needed, caught.value.available) == (1024 * PAGE_SIZE, 4000 << 10)
    assert ksm.setting("run", root) == "1"
    (root / "proc/meminfo").write_text("MemAvailable:    5000 kB\n")
    assert ksm_settings.turn_off(root, unmerge=True) == []
    assert ksm.setting("run", root) == "0"


def test_who_ran_it_before_keeps_it(root: Path) -> None:
    sysfs(root, "run").write_text("1\n")
    ksm_settings.turn_on({"sleep_millisecs": "50"}, root)
    with pytest.raises(InvalidInput, match="was running before"):
        ksm_settings.turn_off(root, unmerge=True)
    ksm_settings.turn_off(root)
    assert (ksm.setting("run", root), ksm.setting("sleep_millisecs", root)) == ("1", "20")


def test_kernels_without_it(root: Path, tmp_path: Path) -> None:
    sysfs(root, "advisor_mode").unlink()
    with pytest.raises(Incompatible, match="no advisor_mode"):
        ksm_settings.turn_on({"advisor_mode": "scan-time"}, root)
    assert ksm.setting("run", root) == "0" and ksm_settings.status([], root).changed == {}
    sysfs(root, "ksm_zero_pages").unlink()
    sysfs(root, "general_profit").unlink()
    found = ksm_settings.status([("gone", 4242)], root)
    assert found.profit is None and found.cpu_seconds is None and found.guests == ()
    shutil.rmtree(sysfs(root, "run").parent)
    with pytest.raises(Incompatible, match="no KSM"):
        ksm_settings.status([], root)


def test_a_value_that_the_kernel_refuses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(values: dict[str, str], root: Path) -> None:
        raise InvalidInput("the kernel refused it")

    monkeypatch.setattr(ksm, "change", refuse)
    with pytest.raises(InvalidInput):
        ksm_settings.turn_on({"pages_to_scan": "0"}, root)
    assert ksm_settings.status([], root).changed == {}
