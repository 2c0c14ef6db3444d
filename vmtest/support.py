"""Generates docs/support.md, the table of combinations that were run, with their results.

The rows are kept in docs/support.json, so that a run of some rows keeps the others. A combination
without a row was not run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

HOSTS = {"Debian 12": "7.2", "Debian 13": "10.0"}
GUESTS = {"bookworm": "Debian 12", "trixie": "Debian 13"}
ACCELS = ("kvm", "tcg")
USERS = {"root": "root", "user": "a user of the group kvm"}
_HEAD = """\
# Tested combinations

`script/test-kvm support` makes this page from its results. In each host it runs the usual commands,
on the command line alone (`build`, `save`, `run`, `exec`, `report`, `stop`, `rm`; vmtest/flow.py).
They lead from a root segment to two clones that answer over HTTP with their own names. Each host
had its release's QEMU, Python and tools. For KVM the host was an emulated one, in which KVM is real
([testing](testing.md)). "Not run" says nothing about whether it works.

| Host | QEMU | Guest | Accelerator | User | Result |
|---|---|---|---|---|---|
"""
_MOVED = """
## Saved under one QEMU, started under another

`script/test-kvm moved` saves a system under one release's QEMU and starts it under the other's. The
QEMUs are those of Debian 12 and Debian 13; the kernel is the same.

| Saved by QEMU | Started by QEMU | Accelerator | Result |
|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Row:
    """A combination that was run."""

    host: str
    guest: str
    """Suite of the root segment."""
    qemu: str
    """Full version of QEMU."""
    accel: str
    user: str
    result: str
    """``works``, ``refused`` or ``failed``."""
    reason: str = ""
    """onecopy's error, unless it works."""
    seconds: int = 0
    """Duration; not shown, because hosts are emulated."""
    saved_by: str = ""
    """Full version of the QEMU that saved the system, if it is another one."""

    @property
    def key(self) -> tuple[str, ...]:
        """The identity of the combination, with QEMU's feature releases."""
        qemu, saved_by = (".".join(v.split(".")[:2]) for v in (self.qemu, self.saved_by))
        return self.host, qemu, self.guest, self.accel, self.user, saved_by


def merge(known: Path, new: Iterable[Row]) -> list[Row]:
    """Replace and add ``new`` rows in the file ``known``; return all rows."""
    try:
        old = [Row(**row) for row in json.loads(known.read_text())]
    except FileNotFoundError:
        old = []
    rows = sorted({row.key: row for row in (*old, *new)}.values(), key=lambda row: row.key)
    known.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def to_markdown(rows: Iterable[Row]) -> str:
    """Format the page with every combination, run or not."""
    by_key = {row.key: row for row in rows}
    lines = []
    for host, qemu, guest, accel, user in itertools.product(
        HOSTS, HOSTS.values(), GUESTS, ACCELS, USERS
    ):
        row = by_key.get((host, qemu, guest, accel, user, ""))
        version = row.qemu if row else qemu
        cells = (host, version, GUESTS[guest], accel.upper(), USERS[user], _result(row, host, qemu))
        lines.append(f"| {' | '.join(cells)} |")
    moved = [_moved(row) for row in by_key.values() if row.saved_by]
    return _HEAD + "\n".join([*lines, _MOVED, *moved]) + "\n"


def _moved(row: Row) -> str:
    result = _result(row, row.host, row.qemu)
    return f"| {row.saved_by} | {row.qemu} | {row.accel.upper()} | {result} |"


def _result(row: Row | None, host: str, qemu: str) -> str:
    if row:
        reason = " ".join(row.reason.replace("|", "/").split())
        return f"**{row.result}**: {reason}" if reason else row.result
    if HOSTS[host] != qemu:
        return f"not run: {host} has another QEMU, {HOSTS[host]}"
    return "not run"
