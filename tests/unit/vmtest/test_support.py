"""docs/support.md says what was run and nothing else (vmtest/support.py)."""

from pathlib import Path

from vmtest.support import Row, merge, to_markdown

WORKS = Row("Debian 12", "bookworm", "7.2.22", "tcg", "root", "works")
REFUSED = Row("Debian 13", "trixie", "10.0.13", "kvm", "user", "refused", "no |\nKVM")


def lines(page: str, *words: str) -> list[str]:
    return [line for line in page.splitlines() if all(f"| {word} |" in line for word in words)]


def test_only_what_was_run_works() -> None:
    page = to_markdown([WORKS, REFUSED])
    rows = [line for line in page.splitlines() if line.startswith("| Debian")]
    assert len(rows) == 2 * 2 * 2 * 2 * 2
    assert [line for line in rows if "works" in line] == [
        "| Debian 12 | 7.2.22 | Debian 12 | TCG | root | works |"
    ]
    (refused,) = lines(page, "10.0.13")
    assert refused.endswith("| **refused**: no / KVM |")
    assert sum("not run" in line for line in rows) == len(rows) - 2


def test_nothing_run_nothing_said() -> None:
    assert "works |" not in to_markdown([])


def test_a_new_row_takes_the_place_of_the_same(tmp_path: Path) -> None:
    known = tmp_path / "support.json"
    assert merge(known, [WORKS, REFUSED]) == [WORKS, REFUSED]
    # Another patch release of QEMU is the same combination.
    broken = Row("Debian 12", "bookworm", "7.2.23", "tcg", "root", "failed", "why")
    assert merge(known, [broken]) == [broken, REFUSED]
    assert merge(known, []) == [broken, REFUSED]
