"""What two clones of a saved system draw from the generators of their programs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from onecopy.guest.exec import run_captured
from onecopy.guest.lifecycle.batch import start_many
from onecopy.guest.lifecycle.restore import start_clone, template
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.store import Artifact
from tests.vm.conftest import RunIn

#: Name -> values.
Drawn = dict[str, set[str]]
#: `... COMMAND`, after ``ask`` was defined: wait until it succeeds, for up to some minutes.
SETTLED = """\
settled() {
    n=0
    until "$@" >/dev/null 2>&1 || [ $n -gt 300 ]; do
        n=$((n + 1))
        sleep 1
    done
}
settled"""


def write(run_in: RunIn, guest: GuestRecord, path: str, content: str, mode: str = "644") -> None:
    """Write a file of a guest's, and the folders above it."""
    script = 'mkdir -p "${1%/*}" && cat >"$1" && chmod "$2" "$1"'
    done = run_in(guest, "sh", "-c", script, "sh", path, mode, stdin=content.encode())
    assert done.exit_code == 0, done


def drawn(
    host: Runtime, system: Artifact, script: str, names: Sequence[str] = ("draws-1", "draws-2")
) -> list[Drawn]:
    """What a shell script says in clones of ``system``: "NAME VALUE", a line each.

    A request that is lost costs a clone a value: so there are several of each name, and clones that
    draw alike have some in common.
    """
    source = template(host, system)
    begun = start_many(
        host, names, lambda name, batch: start_clone(host, source, name, batch=batch)
    )
    started = list(asyncio.run(begun).guests)
    try:
        return [_said(host, guest, script) for guest in started]
    finally:
        for guest in started:
            host.end(guest)


def _said(host: Runtime, guest: GuestRecord, script: str) -> Drawn:
    done = asyncio.run(run_captured(host.run / guest.name, ["sh", "-c", script], timeout=600))
    assert done.exit_code == 0, done
    values: Drawn = {}
    for line in done.text.splitlines():
        name, _, value = line.partition(" ")
        values.setdefault(name, set()).add(value)
    assert "" not in set().union(*values.values()), done
    return values


def alike(pair: Sequence[Drawn]) -> set[str]:
    """Names of which two clones have values in common."""
    first, second = pair
    assert first.keys() == second.keys()
    return {name for name, values in first.items() if values & second[name]}
