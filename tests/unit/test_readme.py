"""tests/README.md: its example is a test that runs, and what it names is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEXT = (TESTS / "README.md").read_text()


def test_the_example_is_a_test_that_runs() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert example == (TESTS / "vm/test_example.py").read_text()


def test_a_vm_test_is_ten_lines() -> None:
    body = (TESTS / "vm/test_example.py").read_text().partition("def test_")[2]
    lines = [line for line in body.splitlines() if line.split("#")[0].strip()]
    assert len(lines) <= 10


def test_what_it_names_is_there() -> None:
    named = re.findall(r"^\| `([\w/.*]+)`", TEXT, re.MULTILINE)
    assert len(named) >= 12
    assert [each for each in named if not each.isupper() and not list(TESTS.glob(each))] == []


def test_its_variables_are_the_tests_own() -> None:
    sources = "".join(path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__))
    named = set(re.findall(r"`(ONECOPY_[A-Z_]+)", TEXT))
    assert named and {each for each in named if f'"{each}"' not in sources} == set()
