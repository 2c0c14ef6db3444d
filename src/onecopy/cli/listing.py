"""The options of all listing commands: --json, --format, --filter and --quiet.

A command passes its rows as the objects that --json prints; docs/json.md has their fields. Not
here: the layout of tables (tables.py).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from onecopy.cli import suggest
from onecopy.cli.output import print_json, print_line
from onecopy.cli.params import ParamType, collect
from onecopy.cli.tables import print_table
from onecopy.errors import InvalidInput, did_you_mean

Row = Mapping[str, Any]
_ESCAPES = {"\\t": "\t", "\\n": "\n", "\\\\": "\\"}
_FIELD = re.compile(r"\{\{\s*\.([A-Za-z_][\w.]*)\s*\}\}")


class Filter(NamedTuple):
    """A condition on one field of a row."""

    field: str
    pattern: str


class Listing(NamedTuple):
    """The options of a listing command."""

    as_json: bool
    format: str | None
    filters: tuple[Filter, ...]
    quiet: bool

    @property
    def by_script(self) -> bool:
        """Whether a program reads the list; the command then prints no notes."""
        return self.as_json or self.quiet or self.format is not None


class FilterType(ParamType):
    """The type of FIELD=PATTERN."""

    name = "filter"

    def convert(self, value: Any, param: object, ctx: object) -> Filter:
        """Split the typed text into field and pattern."""
        field, equals, pattern = str(value).partition("=")
        if not (field and equals):
            raise InvalidInput(
                f"{str(value)[:80]!r} is not a filter",
                hint="write FIELD=PATTERN, for example --filter 'name=web-*'",
            )
        return Filter(field, pattern)


_OPTIONS = (
    click.option(
        "--json", "as_json", is_flag=True, help="Print JSON; docs/json.md has the fields."
    ),
    click.option(
        "--format",
        metavar="FIELDS|TEMPLATE",
        help="Print these fields of --json: a table of name,pid or lines of '{{.name}} {{.pid}}'.",
    ),
    click.option(
        "--filter",
        "filters",
        multiple=True,
        type=FilterType(),
        metavar="FIELD=PATTERN",
        help="List only entries with this field of --json, for example 'name=web-*'. If repeated, "
        "all filters must match.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print names only, one per line."),
)


#: Adds these options to a command, which gets them as one value, ``listing``.
listing_options = collect("listing", Listing, _OPTIONS)


def print_list(
    listing: Listing,
    rows: Sequence[Row],
    fields: Sequence[str],
    *,
    name: Callable[[Row], str] = lambda row: str(row["name"]),
    table: Callable[[Sequence[Row]], None],
) -> None:
    """Print the rows that match the filters, in the requested format.

    Args:
        listing: The options of the command.
        rows: The objects that --json prints.
        fields: The names of their fields, also if there are no rows.
        name: Returns the name of a row, for --quiet.
        table: Prints the rows as a table.
    """
    if listing.as_json + listing.quiet + (listing.format is not None) > 1:
        raise InvalidInput(
            "--json, --format and --quiet exclude each other", hint="give one of them"
        )
    for each in listing.filters:
        _require(each.field, fields)
    rows = [row for row in rows if all(_matches(row, each) for each in listing.filters)]
    if listing.as_json:
        print_json(rows)
    elif listing.quiet:
        for row in rows:
            print_line(name(row))
    elif listing.format is not None:
        _print_format(listing.format, rows, fields)
    else:
        table(rows)


def _print_format(text: str, rows: Sequence[Row], fields: Sequence[str]) -> None:
    if "{{" in text:
        names = _FIELD.findall(text)
        if not names or "{{" in _FIELD.sub("", text):
            raise InvalidInput(
                f"{text[:80]!r} is not a template", hint="write fields as {{.name}}, or name,pid"
            )
        for each in names:
            _require(each, fields)
        text = re.sub(r"\\[tn\\]", lambda match: _ESCAPES[match[0]], text)
        for row in rows:
            lines = _FIELD.sub(lambda match: _text(_value(row, match[1])), text)  # noqa: B023
            for line in lines.split("\n"):
                print_line(line)
        return
    names = [each.strip() for each in text.split(",")]
    for each in names:
        _require(each, fields)
    headings = [each.upper().replace("_", " ") for each in names]
    print_table(headings, [[_text(_value(row, each)) for each in names] for row in rows])


def _require(path: str, fields: Sequence[str]) -> None:
    """Raise InvalidInput unless the first part of a field's name is known."""
    name = path.partition(".")[0]
    if _plain(name) not in map(_plain, fields):
        near = suggest.near(name, fields)
        raise InvalidInput(
            f"there is no field {name[:80]!r}",
            hint=f"{did_you_mean(near)}the fields are {', '.join(fields)}",
        )


def _plain(name: str) -> str:
    """Return a field's name for comparison: Go writes .StartSeconds for start_seconds."""
    return name.lower().replace("_", "")


def _value(row: Any, path: str) -> Any:
    """Return the value of a field, or of a field inside it; None if it does not exist."""
    for part in path.split("."):
        if not isinstance(row, Mapping):
            return None
        row = next((value for key, value in row.items() if _plain(key) == _plain(part)), None)
    return row


def _matches(row: Row, wanted: Filter) -> bool:
    value = _value(row, wanted.field)
    values = value if isinstance(value, list | tuple) and value else [value]
    return any(fnmatch.fnmatchcase(_text(each), wanted.pattern) for each in values)


def _text(value: Any) -> str:
    """Return a value as text: strings unchanged, other values as JSON."""
    import json  # most lists are tables

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
