"""Parses the output of workloads: TAP, the Test Anything Protocol (testanything.org).

The plan comes last, so that truncated output is no result. A line ``# own NAME VALUE`` has a value
that must differ in all clones.
"""

from __future__ import annotations

import re
from enum import Enum

import msgspec

_TEST = re.compile(r"(not )?ok (\d+) - (.+?)( # SKIP.*)?")
_PLAN = re.compile(r"1\.\.(\d+)")
_OWN = re.compile(r"# own (\S+) (.+)")


class End(Enum):
    """How a test ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Results(msgspec.Struct, frozen=True):
    """All tests of one run of a workload."""

    ends: dict[str, End]
    own: dict[str, str]
    """What no other clone may have."""

    def count(self, end: End) -> int:
        """Count the tests that ended so."""
        return sum(each is end for each in self.ends.values())


class Lost(Exception):
    """A run of which not all results came."""


def parse(text: str) -> Results:
    """Read TAP; raise Lost if it is cut off, has no test, or numbers or names them twice."""
    ends: dict[str, End] = {}
    own: dict[str, str] = {}
    plan = None
    for line in text.splitlines():
        if match := _TEST.fullmatch(line):
            failed, number, name, skipped = match.groups()
            if int(number) != len(ends) + 1 or name in ends or plan is not None:
                raise Lost(f"unexpected test: {line}")
            ends[name] = End.FAILED if failed else End.SKIPPED if skipped else End.PASSED
        elif match := _PLAN.fullmatch(line):
            plan = int(match[1])
        elif match := _OWN.fullmatch(line):
            own[match[1]] = match[2]
    if not ends or plan != len(ends):
        raise Lost(f"{len(ends)} results of {plan or 'an unknown number of'} tests")
    return Results(ends, own)
