"""Whether a run in an emulated host is a pass: only if all of it says so.

Results that are missing are a failure, whatever the exit code.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

#: What a kernel prints when it is in trouble that a test might not see.
_TROUBLE = re.compile(
    rb"Out of memory: |Kernel panic|Oops: |BUG: |soft lockup|blocked for more than"
)


def tests(folder: Path) -> list[str]:
    """What speaks against a pass of the tests whose results are in ``folder``."""
    return [*_junit(folder / "junit.xml"), *_proof(folder / "proof.json")]


def _junit(path: Path) -> list[str]:
    try:
        # What pytest wrote in a host of our own.
        suite = next(ET.parse(path).iter("testsuite"))  # noqa: S314
    except (OSError, ET.ParseError, StopIteration):
        return [f"{path.name} is missing or cut off: the tests did not come to their end"]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    bad = [f"{counts[key]} {key}" for key in ("failures", "errors", "skipped") if counts[key]]
    return bad if counts["tests"] else ["no test ran"]


def _proof(path: Path) -> list[str]:
    """tests/vm/kvm/test_proof.py writes it."""
    try:
        proof = json.loads(path.read_text())
    except (OSError, ValueError):
        return ["there is no proof that KVM ran"]
    kvm = proof.get("query-kvm", {})
    if kvm.get("enabled") is True and proof.get("hypervisor") == "KVM":
        return []
    return [f"guests did not run under KVM: {proof}"]


def console(folder: Path) -> list[str]:
    """Trouble that the emulated host's kernel told on its console."""
    try:
        said = (folder / "console.log").read_bytes()
    except OSError:
        return ["console.log is missing"]
    lines = said.replace(b"\r", b"").splitlines()
    trouble = [line for line in lines if _TROUBLE.search(line)]
    return [f"the host's kernel said: {line.decode(errors='replace')}" for line in trouble[:5]]
