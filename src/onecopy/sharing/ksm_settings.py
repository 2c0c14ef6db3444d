"""KSM for this host: turned on, tuned, and put back as it was found.

Its settings are the machine's, and nobody else remembers what they were. So each is noted in
/run/onecopy/ksm.json before it is changed first: whatever becomes of the command, `turn_off` and
`status` know it. The note ends with a reboot, as the settings do. Not here: the kernel's files
(linux/counters/ksm.py), and what merging would gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from onecopy.errors import (
    Incompatible,
    InsufficientResources,
    InvalidInput,
    NotFound,
    NotPermitted,
    Unreadable,
)
from onecopy.linux import files, process
from onecopy.linux.counters import ksm, meminfo
from onecopy.linux.counters.ksm import Ksm, ProcessKsm
from onecopy.linux.files import ROOT, not_permitted
from onecopy.linux.lock import locked_blocking
from onecopy.model import PAGE_SIZE

_FOLDER = "run/onecopy"
_RECORD = "ksm.json"
#: Settings in the order in which they are put back: first nothing is merged any more, then nobody
#: but us chooses pages_to_scan.
_ORDER = ("run", "advisor_mode")


class Changed(msgspec.Struct, frozen=True):
    """A setting of the host that onecopy has changed."""

    found: str
    set: str | None
    """None: the kernel's advisor chooses it."""


class GuestMerging(msgspec.Struct, frozen=True):
    """KSM's work on one guest's QEMU; bytes, None is unknown."""

    name: str
    pid: int
    merged: int | None
    """Pages of it that are merged, or the zero page in place of an empty one."""
    profit: int | None
    """What that saves, less KSM's own records for the process; may be negative."""
    merge_any: bool | None
    """All of QEMU's memory is open to KSM (`run --ksm all`), and not guest RAM alone."""


class Status(msgspec.Struct, frozen=True):
    """KSM on this host now; bytes, None is unknown.

    While it is stopped the kernel's counts stay as they were: processes that have ended since, and
    pages that were written to, are still in them.
    """

    run: int | None
    """0 stopped, merged pages stay; 1 running; 2 stopped, and all pages torn apart."""
    pages_to_scan: int | None
    sleep_millisecs: int | None
    smart_scan: int | None
    advisor_mode: str | None
    shared: int | None
    """Merged pages that are kept, each once."""
    saved: int | None
    """Further places that use them, and empty pages replaced by the zero page."""
    profit: int | None
    """What is saved less KSM's own records; may be negative."""
    unshared: int | None
    """Pages looked at that were like no other."""
    volatile: int | None
    """Pages that change too fast to be merged."""
    full_scans: int | None
    cpu_seconds: float | None
    """CPU time of ksmd since the host's boot."""
    unmerge: int | None
    """Memory that tearing all merged pages apart would take at most: what is saved."""
    changed: dict[str, Changed]
    """What onecopy has changed and not put back."""
    guests: tuple[GuestMerging, ...]


def status(guests: Iterable[tuple[str, int]], root: Path = ROOT) -> Status:
    """KSM now, and what it does for ``guests``, (name, pid) pairs; ended ones are left out.

    Raises Incompatible on a kernel without KSM.
    """
    now = _required(root)
    saved = _saved(now)
    thread = ksm.thread(root)
    return Status(
        run=now.run,
        pages_to_scan=now.pages_to_scan,
        sleep_millisecs=now.sleep_millisecs,
        smart_scan=now.smart_scan,
        advisor_mode=now.advisor_mode,
        shared=_bytes(now.pages_shared),
        saved=saved,
        profit=now.general_profit,
        unshared=_bytes(now.pages_unshared),
        volatile=_bytes(now.pages_volatile),
        full_scans=now.full_scans,
        cpu_seconds=_cpu_seconds(thread, root),
        unmerge=saved,
        changed=_read(root),
        guests=tuple(each for name, pid in guests if (each := _guest(name, pid, root))),
    )


def turn_on(values: Mapping[str, str], root: Path = ROOT) -> None:
    """Let KSM run, with these settings, by name, and all others as they are.

    Raises Incompatible on a kernel without KSM or without one of the settings, NotPermitted, and
    InvalidInput if the kernel refuses a value; nothing is left half done then.
    """
    tune({**values, "run": "1"}, root)


def tune(values: Mapping[str, str], root: Path = ROOT) -> None:
    """Change settings; raises as `turn_on`."""
    _required(root)
    with _locked(root):
        before = _read(root)
        wanted = _noted(before, values, root)
        _write(wanted, root)
        try:
            ksm.change(values, root)
        except BaseException:
            _write(before, root)
            raise


def turn_off(root: Path = ROOT, *, unmerge: bool = False) -> list[str]:
    """Put all settings back as they were found; return those that somebody else has set meanwhile.

    These are left. With ``unmerge`` merged pages are torn apart, too; else they stay merged until
    they are written to. Raises Incompatible, NotPermitted, InsufficientResources when there is no
    memory for that, InvalidInput if KSM ran before.
    """
    now = _required(root)
    with _locked(root):
        changed = _read(root)
        if unmerge:
            _tear_apart(now, changed, root)
        others = []
        for name in sorted(changed, key=_rank):
            each, current = changed[name], ksm.setting(name, root)
            torn = unmerge and name == "run"
            if current not in (each.set, each.found) and each.set is not None and not torn:
                others.append(name)
            elif current != each.found:
                ksm.write(name, each.found, root)
        _write({}, root)
        return others


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _tear_apart(now: Ksm, changed: Mapping[str, Changed], root: Path) -> None:
    if "run" in changed and changed["run"].found == "1":
        raise InvalidInput(
            "KSM ran before onecopy changed it, and would merge all pages again",
            hint="leave --unmerge out",
        )
    needed = _saved(now) or 0
    available = meminfo.read(root).available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory", needed=needed, available=available, hint="stop some guests first"
        )
    ksm.write("run", "2", root)


def _noted(
    before: Mapping[str, Changed], values: Mapping[str, str], root: Path
) -> dict[str, Changed]:
    """The note once ``values`` are set. Raises Incompatible."""
    noted = dict(before)
    wanted: dict[str, str | None] = dict(values)
    if "advisor_mode" in values:
        wanted.setdefault("pages_to_scan", None)
    for name, value in wanted.items():
        current = ksm.required(name, root)
        found = noted[name].found if name in noted else current
        noted[name] = Changed(found, value)
    return noted


def _required(root: Path) -> Ksm:
    now = ksm.read(root)
    if now is None:
        raise Incompatible("this kernel has no KSM", hint="it was built without CONFIG_KSM")
    return now


def _guest(name: str, pid: int, root: Path) -> GuestMerging | None:
    try:
        told = ksm.read_process(pid, root)
    except NotFound:
        return None
    except (NotPermitted, Unreadable):
        told = ProcessKsm(None, None, None, None)
    merged = _bytes(told.merging_pages, told.zero_pages)
    return GuestMerging(name, pid, merged, told.profit, told.merge_any)


def _cpu_seconds(thread: int | None, root: Path) -> float | None:
    with suppress(NotFound):
        return None if thread is None else process.cpu_seconds(thread, root)
    return None


def _saved(now: Ksm) -> int | None:
    return _bytes(now.pages_sharing, now.ksm_zero_pages)


def _bytes(pages: int | None, zero_pages: int | None = None) -> int | None:
    """Bytes of pages and, where the kernel tells them, of those that became the zero page."""
    return None if pages is None else (pages + (zero_pages or 0)) * PAGE_SIZE


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One command at a time changes the settings and their note. Raises NotPermitted."""
    folder = root / _FOLDER
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with locked_blocking(folder / "ksm.lock"):
            yield
    except PermissionError as error:
        raise not_permitted(folder) from error


def _read(root: Path) -> dict[str, Changed]:
    try:
        data = (root / _FOLDER / _RECORD).read_bytes()
    except FileNotFoundError:
        return {}
    return msgspec.json.decode(data, type=dict[str, Changed])


def _write(changed: Mapping[str, Changed], root: Path) -> None:
    path = root / _FOLDER / _RECORD
    if not changed:
        with suppress(FileNotFoundError):
            path.unlink()
        return
    files.replace(path, msgspec.json.encode(changed))
