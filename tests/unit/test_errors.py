"""The error tree: ids, exit codes, and the page that documents them (docs/exit-codes.md)."""

import os
from pathlib import Path

from onecopy import errors
from onecopy.errors import OnecopyError

PAGE = Path(__file__).parents[2] / "docs/exit-codes.md"
FOOT = """
`onecopy exec` exits with the code of the program in the guest: 127 if there is none of that name,
128 + n if signal n ended it, 124 if its time was up. If onecopy itself fails it exits with 125.
`onecopy run SYSTEM -- CMD` exits with CMD's code. A command whose output is read no more
(`onecopy ls | head -1`) exits with 141, 128 + SIGPIPE, and tells nothing. If output cannot be
written for another reason (a full disk, a closed standard output) that is told, with 23. Ctrl-C and
SIGTERM give 130, after all that was begun has been undone. `onecopy doctor`
exits with 1 if something is missing.

This page is made from `src/onecopy/errors.py`; `ONECOPY_REGENERATE=1 pytest
tests/unit/test_errors.py` makes it again.
"""


def _classes() -> list[type[OnecopyError]]:
    return sorted(OnecopyError.__subclasses__(), key=lambda each: each.exit_code)


def _page() -> str:
    rows = [
        f"| {each.exit_code} | `{each.id}` | {(each.__doc__ or '').splitlines()[0]} |"
        for each in _classes()
    ]
    head = "# Exit codes\n\n| code | id | when |\n|---|---|---|\n| 0 | | It worked. |\n"
    says = "Anything else: a bug of ours, told in one line; `ONECOPY_DEBUG=1` shows where."
    other = f"| 1 | `error` | {says} |\n"
    return head + other + "\n".join(rows) + "\n" + FOOT


def test_ids_and_codes_are_unique() -> None:
    classes = _classes()
    assert len({each.id for each in classes}) == len(classes)
    assert len({each.exit_code for each in classes}) == len(classes)
    assert all(1 < each.exit_code < 125 or each.exit_code == 130 for each in classes)


def test_the_tree_in_the_docstring_lists_every_class() -> None:
    for each in _classes():
        assert f" {each.__name__} " in (errors.__doc__ or "")


def test_the_page_is_true() -> None:
    if os.environ.get("ONECOPY_REGENERATE") == "1":
        PAGE.write_text(_page())
    assert PAGE.read_text() == _page()
