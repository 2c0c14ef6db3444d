"""`python -m tests.workloads`: runs workloads, compares the places, writes docs/workloads.md."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from onecopy.errors import OnecopyError
from onecopy.guest.runtime import Runtime
from tests.vm.conftest import remove_rules
from tests.vm.kept import PROJECT, PYTHON_ROOT, SYSTEMD_ROOT, kept_store
from tests.workloads import aged, campaign, powercut, table
from tests.workloads.catalogue import AGED, WORKLOADS, Workload
from tests.workloads.roots import ensure_root
from tests.workloads.tap import Lost

_POWERCUT, _AGED, _ENDS, _HOOKS = "powercut", "aged", "ends", "hooks"
#: Tests of other files that belong to the whole form.
_PYTEST = {
    _ENDS: ("tests/workloads/ends_table.py",),
    _HOOKS: ("tests/workloads/hooks.py", "tests/vm/test_hooks.py"),
}


def main() -> int:
    """0 if all that was chosen came to its end and is right."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[table.Row] = []
    with _host(arguments) as host:
        for name in arguments.what or _names():
            began = time.monotonic()
            try:
                new = _run(host, name, arguments)
            except (Lost, OnecopyError) as error:
                new = [table.failed(name, str(error))]
                _tell(f"{name}: {error}")
            rows += new
            if arguments.write:
                table.write(PROJECT / "docs/workloads.md", new)
            _tell(f"{name}: {time.monotonic() - began:.0f} s")
    print(table.plain(rows))
    return 1 if any(row.wrong for row in rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/workloads", description=__doc__)
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help=f"default: all of {', '.join(_names())}"
    )
    parser.add_argument("--accel", default="auto", choices=("auto", "kvm", "tcg"))
    parser.add_argument("--clones", type=int, default=32, help="of the old system; default: 32")
    parser.add_argument("--cuts", type=int, default=20, help="of a database; default: 20")
    parser.add_argument("--seed", type=int, default=1, help="of the power cuts")
    parser.add_argument(
        "--store", type=Path, help="work in this store, and keep it with the roots that are built"
    )
    parser.add_argument("--write", action="store_true", help="write the rows to docs/workloads.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - set(_names()):
        parser.error(f"no workload is called {', '.join(sorted(unknown))}")
    return arguments


def _names() -> list[str]:
    return [*(each.label for each in WORKLOADS), _POWERCUT, _AGED, *_PYTEST]


@contextmanager
def _host(arguments: argparse.Namespace) -> Iterator[Runtime]:
    """The host: a copy of the kept store, which goes at the end, or the store that was named."""
    with tempfile.TemporaryDirectory(prefix="onecopy-workloads-", dir="/var/tmp") as folder:
        home = arguments.store or Path(folder) / "store"
        if not home.exists():
            with kept_store((PYTHON_ROOT, SYSTEMD_ROOT)) as kept:
                kept.copy(home)
        os.environ["ONECOPY_HOME"] = str(home)
        host = Runtime.open(home)
        try:
            campaign.ensure_programs(host)
            yield host
        finally:
            host.sweep()
            if not arguments.store:  # nobody else has guests of it
                host.end(*host.guests())
                shutil.rmtree(host.run)
            remove_rules()


def _run(host: Runtime, name: str, arguments: argparse.Namespace) -> list[table.Row]:
    if name == _POWERCUT:
        return _powercuts(host, arguments)
    if name == _AGED:
        return _aged(host, arguments)
    if name in _PYTEST:
        return _pytest(name)
    return [_workload(host, next(w for w in WORKLOADS if w.label == name), arguments.accel)]


def _workload(host: Runtime, workload: Workload, accel: str) -> table.Row:
    root = ensure_root(host, workload.root, _tell)
    outcome = campaign.run(host, workload, root, accel, _tell)
    for line in outcome.wrong:
        _tell(f"{workload.label}: {line}")
    if outcome.wrong:
        _tell("\n".join(f"{place}:\n{text[-8000:]}" for place, text in outcome.said.items()))
    return table.of_outcome(outcome)


def _powercuts(host: Runtime, arguments: argparse.Namespace) -> list[table.Row]:
    rows = []
    for database in powercut.DATABASES:
        ensure_root(host, database.root, _tell)
        kinds = ["booted", "clone"] * arguments.cuts
        random = Random(arguments.seed)  # noqa: S311
        done = powercut.cuts(host, database, kinds[: arguments.cuts], random, arguments.accel)
        rows.append(table.of_cuts(database, done))
    return rows


def _aged(host: Runtime, arguments: argparse.Namespace) -> list[table.Row]:
    ensure_root(host, AGED, _tell)
    done = aged.run(host, arguments.clones, arguments.accel)
    for line in done.wrong():
        _tell(line)
    return [table.of_aged(done)]


def _pytest(name: str) -> list[table.Row]:
    """Tests with a store of their own; they tell their counts by pytest's report."""
    paths = [PROJECT / path for path in _PYTEST[name]]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--junitxml={report}",
            *map(str, paths),
        ]
        environment = {key: value for key, value in os.environ.items() if key != "ONECOPY_HOME"}
        subprocess.run(argv, cwd=PROJECT, env=environment)
        return [table.of_pytest(name, report)]


def _tell(text: str) -> None:
    print(f"workloads: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
