"""What two clones of a saved system draw from the generators of their programs."""

from __future__ import annotations

from collections.abc import Sequence

from onecopy import Guest
from onecopy.guest.run_directory import GuestRecord
from onecopy.store import Artifact
from tests.vm.conftest import RunIn
from tests.vm.guests import open_guests

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


def drawn(system: Artifact, script: str, name: str = "draws") -> list[Drawn]:
    """What a shell script says in two clones of ``system``: "NAME VALUE", a line each.

    A request that is lost costs a clone a value: so there are several of each name, and clones that
    draw alike have some in common.
    """
    with open_guests() as guests:
        return [_said(guest, script) for guest in guests.clone(system, 2, name=name)]


def _said(guest: Guest, script: str) -> Drawn:
    done = guest.exec(["sh", "-c", script], timeout=600)
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
