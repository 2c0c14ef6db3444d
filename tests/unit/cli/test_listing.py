"""What all listing commands have in common: --json, --format, --filter, --quiet."""

import json
from collections.abc import Sequence

import pytest

from onecopy.cli.listing import Filter, Listing, Row, print_list
from onecopy.errors import InvalidInput
from onecopy.model import in_order

ROWS: list[Row] = [
    {"name": "web-1", "pid": 7, "start_seconds": 0.5, "ended": None, "users": ["a", "b"]},
    {"name": "db", "pid": 8, "start_seconds": 2.0, "ended": {"cause": "killed"}, "users": []},
]
FIELDS = ("name", "pid", "start_seconds", "ended", "users")


def _table(rows: Sequence[Row]) -> None:
    print("table of", *(row["name"] for row in rows))


def listed(capsys: pytest.CaptureFixture[str], **options: object) -> str:
    listing = Listing(as_json=False, format=None, filters=(), quiet=False)
    print_list(listing._replace(**options), ROWS, FIELDS, table=_table)  # type: ignore[arg-type]
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({}, "table of web-1 db\n"),
        ({"quiet": True}, "web-1\ndb\n"),
        ({"format": "{{.name}} {{.pid}}"}, "web-1 7\ndb 8\n"),
        ({"format": "{{ .Name }}\\t{{.StartSeconds}}"}, "web-1\t0.5\ndb\t2.0\n"),
        ({"format": "{{.Ended.Cause}}"}, "null\nkilled\n"),
        ({"format": "{{.users}}!"}, '["a", "b"]!\n[]!\n'),
        ({"format": "name,start_seconds"}, "NAME   START SECONDS\nweb-1            0.5\n"
         "db               2.0\n"),
        ({"filters": (Filter("name", "web-*"),), "quiet": True}, "web-1\n"),
        ({"filters": (Filter("users", "b"),), "quiet": True}, "web-1\n"),
        ({"filters": (Filter("ended", "null"),), "quiet": True}, "web-1\n"),
        ({"filters": (Filter("ended.cause", "kill*"),), "quiet": True}, "db\n"),
        ({"filters": (Filter("pid", "8"), Filter("name", "web-*")), "quiet": True}, ""),
        ({"filters": (Filter("pid", "8"),)}, "table of db\n"),
    ],
)  # fmt: skip
def test_a_list(
    capsys: pytest.CaptureFixture[str], options: dict[str, object], printed: str
) -> None:
    assert listed(capsys, **options) == printed


def test_json_is_filtered_too(capsys: pytest.CaptureFixture[str]) -> None:
    out = listed(capsys, as_json=True, filters=(Filter("pid", "7"),))
    assert json.loads(out) == [ROWS[0]]


def test_what_others_wrote_begins_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    listing = Listing(as_json=False, format="{{.name}}", filters=(), quiet=False)
    print_list(listing, [{"name": "a\x1b[31m"}], ("name",), table=_table)
    assert capsys.readouterr().out == "a\\x1b[31m\n"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"format": "nam,pid"}, "did you mean name?"),
        ({"format": "{{.Nmae}}"}, "the fields are name, pid"),
        ({"format": "{{name}}"}, "{{.name}}"),
        ({"format": "{{.name}} {{x"}, "{{.name}}"),
        ({"format": ""}, "the fields are"),
        ({"filters": (Filter("nmae", "x"),)}, "did you mean name?"),
        ({"as_json": True, "quiet": True}, "one of them"),
        ({"format": "name", "quiet": True}, "one of them"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], options: dict[str, object], hint: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        listed(capsys, **options)
    assert hint in caught.value.hint


def test_names_are_in_the_order_that_people_count() -> None:
    names = ["web-10", "web-2", "db", "web-1", "web-01"]
    assert sorted(names, key=in_order) == ["db", "web-01", "web-1", "web-2", "web-10"]
