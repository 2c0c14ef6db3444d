"""Tests that fail, or fail in some places, with the reason; each entry was investigated.

The campaign fails on a difference without an entry, and on an entry that no longer applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import msgspec

from tests.workloads.tap import End, Results

CHROOT, BOOTED, CLONE = "chroot", "booted", "clone"


class Expected(msgspec.Struct, frozen=True):
    """How some tests of a workload end, and why."""

    workload: str
    """Its name; the short form of "cpython" has those of its entries whose tests ran."""
    tests: str
    """Names of tests, as fnmatch has it."""
    chroot: End
    guests: End
    """Booted guests and clones."""
    reason: str

    def says(self, ends: Mapping[str, End | None]) -> bool:
        """Whether a test ended as this says, in each place that it ran in."""
        wanted = {CHROOT: self.chroot}
        return all(end is wanted.get(place, self.guests) for place, end in ends.items())


_PASSED, _SKIPPED = End.PASSED, End.SKIPPED

EXPECTED = (
    Expected(
        "cpython",
        "test.test_largefile.*.test_it",
        _PASSED,
        _SKIPPED,
        "it wants 5 GiB of free space, and a guest's root lies in its RAM",
    ),
)


def differences(
    workload: str, results: Mapping[str, Results], expected: tuple[Expected, ...] = EXPECTED
) -> list[str]:
    """What is wrong with the results of all places: a line for each test, and for each stale entry.

    A test is right if it passed or was skipped everywhere, ended as an entry says, or was skipped
    only in the chroot: there the host's kernel and network decide what can run (`only_in_guests`).
    An entry of which no test ran is for a longer form of the workload.
    """
    entries = [each for each in expected if each.workload == workload]
    ran: set[Expected] = set()
    used: set[Expected] = set()
    wrong = []
    for test in sorted({test for result in results.values() for test in result.ends}):
        ends = {place: result.ends.get(test) for place, result in results.items()}
        named = [each for each in entries if fnmatchcase(test, each.tests)]
        fitting = [each for each in named if each.says(ends)]
        ran.update(named)
        used.update(fitting)
        same = set(ends.values()) in ({End.PASSED}, {End.SKIPPED}) or _only_in_guests(ends)
        if not fitting and not same:
            told = ", ".join(f"{p} {end.value if end else 'missing'}" for p, end in ends.items())
            wrong.append(f"{test}: {told}")
    stale = [each for each in entries if each in ran and each not in used]
    return [*wrong, *(f"{each.tests}: expected to differ, but does not" for each in stale)]


def only_in_guests(results: Mapping[str, Results]) -> int:
    """Count the tests that passed in all guests and were skipped in the chroot."""
    tests = results[CHROOT].ends if CHROOT in results else {}
    return sum(
        _only_in_guests({place: result.ends.get(test) for place, result in results.items()})
        for test in tests
    )


def _only_in_guests(ends: Mapping[str, End | None]) -> bool:
    guests = {end for place, end in ends.items() if place != CHROOT}
    return ends.get(CHROOT) is End.SKIPPED and guests == {End.PASSED}


def not_own(results: Mapping[str, Results]) -> list[str]:
    """What two places have alike that each must have for itself."""
    seen: dict[tuple[str, str], str] = {}
    wrong = []
    for place, result in results.items():
        for name, value in result.own.items():
            other = seen.setdefault((name, value), place)
            if other != place:
                wrong.append(f"{name} of {other} and {place} is the same: {value}")
    return wrong
