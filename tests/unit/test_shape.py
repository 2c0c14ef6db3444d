"""The shape of the code: short files and functions, few parameters, imports that go one way.

What breaks a rule today is on a list with its reason. A list may only shrink: an entry that is not
needed any more fails, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit import shape

PROJECT = Path(__file__).parents[2]
SOURCE = PROJECT / "src/onecopy"
#: Rooms from the ground up: each imports from rooms below it only. "" is the package's face.
LAYERS = (
    ("errors",),
    ("model",),
    ("printable", "deadline", "later", "leaving", "loop"),
    ("subprocesses",),
    ("linux",),
    ("store", "vmm", "sharing"),
    ("images",),
    ("guest",),
    ("guest.transfer", "guest.pagecache"),
    ("guest.segments",),
    ("guest.lifecycle",),
    ("guest.observe",),
    ("aio",),
    ("sync",),
    ("demo",),
    ("",),
    ("cli",),
    ("__main__",),
)
#: Rule -> "WHERE" as the fault names it -> why it stands so far.
ALLOWED: dict[str, dict[str, str]] = {}


def beyond(rule: str, faults: list[str]) -> list[str]:
    """The faults that are not allowed, and the permissions that nothing needs any more."""
    allowed = dict(ALLOWED.get(rule, {}))
    left = [each for each in faults if not allowed.pop(each.partition(": ")[0], "")]
    return left + [f"{each} keeps the rule now: take it off the list" for each in allowed]


def test_files_are_short() -> None:
    found = shape.median(SOURCE)
    told = f"the median is {found:g} lines, wanted {shape.MEDIAN}; none over {shape.FILE_LINES}"
    assert beyond("long_files", shape.long_files(SOURCE)) == [], told
    assert shape.MEDIAN[0] <= found <= shape.MEDIAN[1], told


def test_functions_are_short() -> None:
    assert beyond("long_functions", shape.long_functions(SOURCE)) == []


def test_functions_take_few_parameters() -> None:
    assert beyond("wide_functions", shape.wide_functions(SOURCE)) == []


def test_imports_make_no_circle() -> None:
    assert shape.circle(shape.imports(SOURCE, "onecopy")) == []


def test_rooms_import_one_way() -> None:
    graph = shape.imports(SOURCE, "onecopy")
    assert beyond("upward_imports", shape.upward_imports(graph, LAYERS)) == []


def test_nothing_stands_twice() -> None:
    assert beyond("repetitions", shape.repetitions(SOURCE)) == []


def test_tests_share_kits_and_not_each_other() -> None:
    assert shape.imports_of_tests(PROJECT / "tests") == []


# The measures themselves: on code that breaks a rule by one line, and on code that just keeps it.

LINES = "".join(f"    x = {number}\n" for number in range(shape.FUNCTION_LINES))
WIDE = ", ".join("abcdefg")


@pytest.mark.parametrize(
    ("measure", "text", "told"),
    [
        (shape.long_files, "x = 1\n" * 401, ["code.py: 401 lines"]),
        (shape.long_files, "x = 1\n" * 400, []),
        (shape.long_functions, f"def f():\n{LINES}", ["code.py:f: 51 lines"]),
        (
            shape.long_functions,
            "@once\n@twice\n" + f"def f():\n{LINES}".removesuffix("    x = 49\n"),
            [],
        ),
        (shape.wide_functions, f"def f({WIDE}): ...", ["code.py:f: 7 parameters"]),
        (
            shape.wide_functions,
            "def f(a, /, b, *c, d, e, f, **g): ...",
            ["code.py:f: 7 parameters"],
        ),
        (shape.wide_functions, "async def f(a, b, c, d, e, f): ...", []),
        (shape.wide_functions, "class A:\n def f(self, a, b, c, d, e, f): ...", []),
        (
            shape.wide_functions,
            f"class A:\n async def f(self, {WIDE}): ...",
            ["code.py:A.f: 7 parameters"],
        ),
        (
            shape.wide_functions,
            f"def f():\n if 1:\n  def g({WIDE}): ...",
            ["code.py:f.g: 7 parameters"],
        ),
        (shape.wide_functions, f"@click.command('f')\ndef f({WIDE}): ...", []),
        (
            shape.wide_functions,
            f"@click.option('f')\ndef f({WIDE}): ...",
            ["code.py:f: 7 parameters"],
        ),
    ],
)
def test_a_measure(
    measure: Callable[[Path], list[str]], text: str, told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text(text)
    assert measure(tmp_path) == told


def tree(root: Path, **content: str) -> Path:
    """A package of modules, ``a__b`` for a/b.py."""
    for name, text in content.items():
        path = root / "pack" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "pack"


def test_a_circle_is_found(tmp_path: Path) -> None:
    one = tree(tmp_path, a="from pack import b", b="def f():\n    import pack.c", c="")
    assert shape.circle(shape.imports(one, "pack")) == []
    (one / "c.py").write_text("from pack.a import x")
    assert set(shape.circle(shape.imports(one, "pack"))) == {"a", "b", "c"}


def test_an_import_upwards_is_found(tmp_path: Path) -> None:
    one = tree(
        tmp_path, low="", low2="", up__a="from pack.low import x", up__deep__b="import pack.up.a"
    )
    layers = (("low", "low2"), ("up",), ("up.deep",))
    assert shape.upward_imports(shape.imports(one, "pack"), layers) == []
    (one / "low.py").write_text("if TYPE_CHECKING:\n    from pack.low2 import x")
    (one / "up/a.py").write_text("from pack.up.deep import b")
    (one / "stray.py").write_text("")
    assert shape.upward_imports(shape.imports(one, "pack"), layers) == [
        "low imports low2",
        "stray is in no room",
        "up.a imports up.deep.b",
    ]


def test_a_repetition_is_found(tmp_path: Path) -> None:
    passage = [f"x{number} = {number}" for number in range(shape.EQUAL_LINES)]
    other = ["", "def f():", *(f"    {line}\n" for line in passage)]
    one = tree(tmp_path, a="\n".join(passage), b="\n".join(other))
    assert shape.repetitions(one) == ["b.py:3 repeats a.py:1"]
    (one / "a.py").write_text("\n".join(passage[1:]))
    assert shape.repetitions(one) == []
    imports = "\n".join(f"import m{number}" for number in range(20))
    (one / "a.py").write_text(imports)
    (one / "b.py").write_text(imports)
    assert shape.repetitions(one) == []


def test_a_test_that_imports_a_test_is_found(tmp_path: Path) -> None:
    one = tree(tmp_path, test_a="", kit="", vm__test_b="import pack.kit\nfrom pack.test_a import x")
    (one / "kit.py").write_text("from pack.vm import test_b")
    assert shape.imports_of_tests(one) == ["kit imports vm.test_b", "vm.test_b imports test_a"]
