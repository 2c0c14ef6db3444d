"""Every error says what to do: golden list of all hints, and the reasons of those without one.

`ONECOPY_REGENERATE=1 pytest tests/unit/test_hints.py` makes tests/unit/data/hints.txt anew.
"""

import os
from pathlib import Path

import pytest

from onecopy import errors
from onecopy.errors import OnecopyError
from tests.unit.raised_errors import Made, made_errors

SOURCE = Path(__file__).parents[2] / "src/onecopy"
HINTS = Path(__file__).parent / "data/hints.txt"
_ALL: list[type[OnecopyError]] = [OnecopyError, *OnecopyError.__subclasses__()]
CLASSES = {each.__name__: each for each in _ALL}
#: Classes that make their hint of what they are given.
OWN = {"MissingProgram", "OutputFailed", "ProgramFailed"}
_CALLER = "only code can pass such a value, and the message names it"
_FILE = "the message names the file, which is the user's own argument"
#: "WHERE ERROR" -> why it has no hint.
NO_HINT = {
    "cli/__init__.py:_run Interrupted": "the user has interrupted it",
    "guest/observe/ksm_auto.py:_look Incompatible": "the kernel cannot be changed meanwhile",
    "guest/segments/protocol.py:exclusive InvalidInput": "a guest is answered, and nobody reads it",
    "linux/counters/kpage.py:_entry InvalidInput": _CALLER,
    "linux/counters/pagemap.py:read InvalidInput": _CALLER,
    "linux/files.py:open_regular InvalidInput": _FILE,
    "linux/files.py:open_regular NotFound": _FILE,
    "sharing/ram_scan.py:scan NotFound": "the guest is left out, and this is the reason told",
    "store/ingest.py:_require_digest InvalidInput": _CALLER,
    "store/ingest.py:_require_file InvalidInput": _CALLER,
    "store/ingest.py:_require_file NotFound": _CALLER,
    "store/ingest.py:describe InvalidInput": _CALLER,
}


def _made() -> list[Made]:
    return made_errors(SOURCE, CLASSES)


def _has_hint(made: Made) -> bool:
    return bool(made.hint or CLASSES[made.error].default_hint) or made.error in OWN


def test_every_error_has_a_hint_or_a_reason_for_none() -> None:
    without = {f"{made.where} {made.error}" for made in _made() if not _has_hint(made)}
    assert without == set(NO_HINT)


@pytest.mark.parametrize("name", sorted(OWN))
def test_these_make_their_own(name: str) -> None:
    made = {
        "MissingProgram": errors.MissingProgram("mke2fs", "e2fsprogs"),
        "OutputFailed": errors.OutputFailed(1, 28),
        "ProgramFailed": errors.ProgramFailed("web", "true", 1, b"", b""),
    }[name]
    assert made.hint


def test_what_is_given_comes_before_the_class_s_own() -> None:
    assert errors.BadSource("x").hint == errors.BadSource.default_hint
    assert errors.BadSource("x", hint="y").hint == "y"


def test_the_hints_are_as_recorded() -> None:
    lines = [f"{made.where} {made.error}\n    {made.hint}\n" for made in _made() if made.hint]
    lines += [f"{each.__name__}\n    {each.default_hint}\n" for each in CLASSES.values()
              if each.default_hint]  # fmt: skip
    text = "".join(lines)
    if os.environ.get("ONECOPY_REGENERATE") == "1":
        HINTS.write_text(text)
    assert HINTS.read_text() == text


def test_the_measure_finds_errors(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "class A:\n"
        "    def f(self):\n"
        '        raise NotFound("x", hint=f"do {self.y}")\n'
        "def g():\n"
        '    return errors.NotFound("x", hint=said)\n'
        'NotFound("z")\n'
    )
    assert made_errors(tmp_path, ["NotFound"]) == [
        Made("code.py:A.f", "NotFound", "do {self.y}"),
        Made("code.py:g", "NotFound", "(said)"),
        Made("code.py:", "NotFound", ""),
    ]
