"""Judges the results of a run in an emulated host.

Missing results are a failure, whatever the exit code.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

#: The test that proves it; a selection of tests needs it, too.
PROOF = "tests/vm/kvm/test_proof.py"
#: Kernel messages of problems that a test might not notice.
_TROUBLE = re.compile(
    rb"Out of memory: |Kernel panic|Oops: |BUG: |soft lockup|blocked for more than"
)


def tests(folder: Path) -> list[str]:
    """Return the problems in the test results in ``folder``; none for a pass."""
    return [*_junit(folder / "junit.xml"), *_proof(folder / "proof.json")]


def _junit(path: Path) -> list[str]:
    try:
        # pytest wrote the file in our own emulated host, so it is trusted.
        suite = next(ET.parse(path).iter("testsuite"))  # noqa: S314
    except (OSError, ET.ParseError, StopIteration):
        return [f"{path.name} is missing or truncated: the tests did not finish"]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    bad = [f"{counts[key]} {key}" for key in ("failures", "errors", "skipped") if counts[key]]
    return bad if counts["tests"] else ["no test ran"]


def _proof(path: Path) -> list[str]:
    """Check the file that PROOF writes."""
    try:
        proof = json.loads(path.read_text())
    except (OSError, ValueError):
        return [f"there is no proof that KVM ran: select {PROOF}, too"]
    kvm = proof.get("query-kvm", {})
    if kvm.get("enabled") is True and proof.get("hypervisor") == "KVM":
        return []
    return [f"guests did not run under KVM: {proof}"]


def console(folder: Path) -> list[str]:
    """Return the problems that the emulated host's kernel printed on its console."""
    try:
        said = (folder / "console.log").read_bytes()
    except OSError:
        return ["console.log is missing"]
    lines = said.replace(b"\r", b"").splitlines()
    trouble = [line for line in lines if _TROUBLE.search(line)]
    return [f"the host's kernel printed: {line.decode(errors='replace')}" for line in trouble[:5]]
