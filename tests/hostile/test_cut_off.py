"""Files of /proc that end anywhere, or hold anything; command lines of anybody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecopy.errors import NotFound, OnecopyError
from onecopy.linux import process
from onecopy.linux.counters import ksm, meminfo, pagemap, smaps, zoneinfo
from onecopy.model import MIB
from onecopy.sharing import live_figures, report
from onecopy.sharing.account import GuestMaps
from onecopy.vmm import cmdline

RECORDED = Path(__file__).parents[1] / "unit/data/6.18.44-fc-v669"
PID = 1001
MAPS = GuestMaps("booted", PID, None, 256 * MIB)
READERS: dict[str, list[Callable[[Path], object]]] = {
    "stat": [lambda root: process.stat(PID, root), lambda root: process.exists(PID, root)],
    "cmdline": [lambda root: cmdline.parse(process.cmdline(PID, root))],
    "status": [lambda root: process.memory(PID, root), lambda root: process.owner(PID, root)],
    "smaps": [lambda root: smaps.read(PID, root)],
    "smaps_rollup": [lambda root: smaps.read_rollup(PID, root)],
    "ksm_stat": [lambda root: ksm.read_process(PID, root)],
    "ksm_merging_pages": [lambda root: ksm.read_process(PID, root)],
    "pagemap": [lambda root: pagemap.read(PID, 0, 4, root)],
}
ALL: list[Callable[[Path], object]] = [
    lambda root: report.collect([MAPS], root=root),
    lambda root: live_figures.sample([("booted", PID)], merging=True, root=root),
]
fast = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(RECORDED / "proc", tmp_path / "proc")
    return tmp_path


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@fast
def test_any_end_and_any_bytes(root: Path, name: str, data: st.DataObject) -> None:
    recorded = RECORDED / "proc" / str(PID) / name
    whole = recorded.read_bytes() if recorded.exists() else bytes(64)
    end = data.draw(st.integers(0, len(whole)))
    middle = data.draw(st.binary(max_size=40) | st.just(b"9" * 5000))
    text = whole[:end] + middle + whole[end : end + data.draw(st.integers(0, 200))]
    (root / "proc" / str(PID) / name).write_bytes(text)
    for read in READERS[name] + ALL:
        with suppress(OnecopyError):
            read(root)


@pytest.mark.parametrize("end", [0, 10, 100, 1000])
def test_a_map_that_is_cut_off_is_not_less(root: Path, end: int) -> None:
    """Figures are whole, or unknown."""
    path = root / "proc" / str(PID) / "smaps"
    path.write_bytes(path.read_bytes()[: -end - 1])
    (found,) = report.collect([MAPS], root=root).guests
    assert found.note and found.ram_private is None and found.pss_total is None


def test_one_that_ended_while_it_was_read_is_left_out(root: Path) -> None:
    path = root / "proc" / str(PID) / "stat"
    fields = path.read_text().split()
    for place, value in ((2, "Z"), (22, "0")):
        path.write_text(" ".join([*fields[:place], value, *fields[place + 1 :]]) + "\n")
        assert report.collect([MAPS], root=root).guests == ()
    path.write_text(" ".join(fields) + "\n")
    assert len(report.collect([MAPS], root=root).guests) == 1
    later = GuestMaps("booted", PID, None, 256 * MIB, start_ticks=int(fields[21]) + 1)
    assert report.collect([later], root=root).guests == ()


def test_what_ends_before_it_is_read_at_all(root: Path) -> None:
    for name in READERS:
        (root / "proc" / str(PID) / name).write_bytes(b"")
    assert report.collect([MAPS], root=root).guests == ()
    assert live_figures.sample([("booted", PID)], merging=True, root=root) == []
    with pytest.raises(NotFound):
        smaps.read_rollup(PID, root)


@given(st.binary(max_size=300), st.sampled_from(["meminfo", "zoneinfo"]))
@fast
def test_the_hosts_files(root: Path, text: bytes, name: str) -> None:
    (root / "proc" / name).write_bytes(text + b"MemTotal: " + b"9" * 5000 + b" kB\n")
    meminfo.read(root)
    zoneinfo.free_on_lists(root)


_KEYS = st.sampled_from(
    ["type", "id", "qom-type", "mem-path", "memory-backend", "memdev", "size", "guest"]
) | st.sampled_from(["file", "filename", "file.filename", "driver"])
_OPTIONS = st.sampled_from(
    ["-m", "-M", "-machine", "-object", "-numa", "-mem-path", "-name", "-hda", "-drive"]
) | st.sampled_from(["-blockdev", "-cdrom", "--", "-"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | _KEYS, inner),
)
_OBJECT = st.dictionaries(_KEYS, _JSON | st.sampled_from(["memory-backend-file", "r", "/a"]))
_VALUES = st.one_of(
    st.text(st.characters(codec=None)),
    _OBJECT.map(json.dumps),
    st.lists(st.tuples(_KEYS, st.text()), max_size=5).map(
        lambda pairs: ",".join(f"{key}={value}" for key, value in pairs)
    ),
    st.integers().map(str),
    st.sampled_from(["{" * 3000, '{"file":' * 3000, "[" * 3000, "," * 3000, "9" * 5000]),
)


@given(st.lists(st.tuples(_OPTIONS, _VALUES).map(list) | _VALUES.map(lambda each: [each])))
@settings(max_examples=150)
def test_any_command_line(words: list[list[str]]) -> None:
    argv = [word for some in words for word in some]
    found = cmdline.parse(["qemu-system-x86_64", *argv])
    if found is None:
        return
    assert isinstance(found.name, str) and 0 < found.ram_bytes <= 1 << 57
    assert found.ram_path is None or isinstance(found.ram_path, str)
    assert all(isinstance(each, str) for each in (*found.disks, *found.files))
    assert len(found.disks) <= 64 and len(found.files) <= 64
