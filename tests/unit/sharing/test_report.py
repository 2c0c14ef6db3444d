"""report: totals, blobs counted once, JSON that stays, and rows that say what they lack."""

import json
import os
import subprocess
import sys
from pathlib import Path

from msgspec.structs import fields, replace

from onecopy.sharing import report
from onecopy.sharing.account import GuestAccount, GuestMaps
from tests.unit.other_user import as_nobody

RECORDED = Path(__file__).parents[1] / "data/6.18.44-fc-v669"
MIB = 1 << 20
COLD = GuestMaps("cold", 1001, None, 256 * MIB)
CLONE = GuestMaps(
    "clone", 1002, "/tmp/onecopy-rec/ram", 256 * MIB, {"/tmp/onecopy-rec/segment": "base"}
)
GONE = GuestMaps("gone", 2**22 + 1, "/gone", 256 * MIB)

# Maps argv[1] shared and argv[2] privately, reads both, and waits.
READER = """
import mmap, sys
with open(sys.argv[1], 'rb') as f, open(sys.argv[2], 'rb') as g:
    s = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    m = mmap.mmap(g.fileno(), 0, access=mmap.ACCESS_COPY)
print(sum(s[::4096]) + sum(m[::4096]), flush=True)
input()
"""


def test_totals_are_sums_of_the_rows() -> None:
    found = report.collect([COLD, CLONE, GONE], root=RECORDED)
    assert [guest.name for guest in found.guests] == ["cold", "clone"]
    # Anonymous of the RAM mappings in the recorded text, in KiB.
    assert found.totals["ram_private"] == (6144 + 1092) << 10
    assert found.totals["ram_size"] == 512 * MIB
    assert found.totals["page_tables"] == (212 + 232) << 10
    assert found.totals["segments"] == 0
    assert set(found.totals) == {c.key for c in report.COLUMNS if c.summed}


def test_others_are_in_no_total_but_map_files(tmp_path: Path) -> None:
    alone = report.collect([COLD], root=RECORDED)
    found = report.collect([COLD], [CLONE, GONE], root=RECORDED)
    assert [guest.name for guest in found.others] == ["clone"]
    assert (found.guests, found.totals) == (alone.guests, alone.totals)
    users = [(blob.name, blob.guests, blob.others) for blob in found.blobs]
    assert users == [("base", 0, 1), ("clone", 0, 1)]
    # Unknown, but nothing of the guests'.
    assert [blob.resident for blob in found.blobs] == [None, None]
    assert found.resident == 0


def test_one_unknown_figure_makes_its_total_unknown() -> None:
    found = report.collect([COLD, CLONE], root=RECORDED)
    partial = replace(found.guests[0], pss_total=None, segments=None)
    changed = replace(found, guests=(partial, found.guests[1]))
    assert changed.totals["pss_total"] is None
    assert changed.totals["segments"] is None
    assert changed.totals["ram_private"] == found.totals["ram_private"]


def test_blobs_that_are_gone_are_unknown() -> None:
    found = report.collect([CLONE], root=RECORDED)
    assert [(b.name, b.kind, b.size, b.resident, b.guests) for b in found.blobs] == [
        ("base", "segment", None, None, 1),
        ("clone", "ram", None, None, 1),
    ]
    assert found.resident is None


def test_every_column_is_a_field_and_says_what_it_counts() -> None:
    keys = {column.key for column in report.COLUMNS}
    assert keys | {"ram_path"} == {field.name for field in fields(GuestAccount)}
    assert [c.key for c in report.BLOB_COLUMNS] == [f.name for f in fields(report.Blob)]
    for column in report.COLUMNS + report.BLOB_COLUMNS:
        assert column.counts.endswith(".")
        assert column.heading.isupper()


def test_json_fields_are_stable() -> None:
    text = json.dumps(report.collect([COLD, CLONE], root=RECORDED).to_json())
    told = json.loads(text)
    fields = {"version", "guests", "others", "servers", "blobs", "totals", "blobs_resident"}
    assert set(told) == fields | {"left_out"}
    assert told["version"] == 1
    clone = told["guests"][1]
    assert clone["segments"] == [
        {
            "name": "base",
            "path": "/tmp/onecopy-rec/segment",
            "mapped": 4 * MIB,
            "resident": 0,
            "private": 0,
            "proportional": 0,
            "huge": 0,
        }
    ]
    assert set(clone) == {column.key for column in report.COLUMNS} | {"ram_path"}
    assert set(told["blobs"][0]) == {column.key for column in report.BLOB_COLUMNS}
    assert told["blobs_resident"] is None


def test_a_page_of_two_guests_counts_once(tmp_path: Path) -> None:
    segment, ram = tmp_path / "segment", tmp_path / "ram"
    for path in (segment, ram):
        path.write_bytes(os.urandom(MIB))
    argv = [sys.executable, "-c", READER, str(segment), str(ram)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(argv, stdin=pipe, stdout=pipe) as one,
        subprocess.Popen(argv, stdin=pipe, stdout=pipe) as two,
    ):
        for process in (one, two):
            assert process.stdout
            process.stdout.readline()
        found = report.collect(
            GuestMaps(name, process.pid, str(ram), MIB, {str(segment): "base"})
            for name, process in (("a", one), ("b", two))
        )
        one.kill()
        two.kill()
    assert [guest.ram_private for guest in found.guests] == [0, 0]
    assert found.totals["ram_shared"] == found.totals["segments"] == 2 * MIB
    assert found.blobs == (
        report.Blob("base", "segment", str(segment), MIB, MIB, 2, 0),
        report.Blob("a, b", "ram", str(ram), MIB, MIB, 2, 0),
    )
    assert found.resident == 2 * MIB
    # Each file's pages are in both processes; the proportional total holds them once.
    whole = found.totals["vmm_private"], found.totals["vmm_shared"], found.totals["pss_total"]
    private, shared, proportional = (figure or 0 for figure in whole)
    assert private + 2 * MIB <= proportional <= private + shared + 2 * MIB


def test_other_users_see_what_they_may() -> None:
    maps = GuestMaps("a", os.getpid(), None, 4096, {"/none": "base"})
    found = as_nobody(lambda: report.collect([maps]).to_json())
    (row,) = found["guests"]
    assert (row["ram_private"], row["pss_total"], row["segments"]) == (None, None, None)
    assert row["page_tables"] > 0
    assert "root" in row["note"]
    assert found["totals"]["ram_private"] is None
    assert found["blobs"][0]["guests"] is None
