"""KSM on this host: turn it on, tune it, and restore the original settings.

The settings belong to the whole host, and the kernel does not remember old values. So each is
recorded in /run/onecopy/ksm.json before its first change. `turn_off` and `status` find the record
even if the command was killed. The record ends with a reboot, like the settings.

Not here: the kernel's files (linux/counters/ksm.py), and what merging would gain.
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

_DIRECTORY = "run/onecopy"
_RECORD = "ksm.json"
#: Settings to restore first: stop merging, then stop the advisor, which changes pages_to_scan.
_ORDER = ("run", "advisor_mode")


class Changed(msgspec.Struct, frozen=True):
    """A setting of the host that onecopy has changed."""

    found: str
    set: str | None
    """None if the kernel's advisor chooses it."""


class GuestMerging(msgspec.Struct, frozen=True):
    """The work of KSM on one guest's QEMU; bytes, None is unknown."""

    name: str
    pid: int
    merged: int | None
    """Pages that are merged, or replaced by the zero page."""
    profit: int | None
    """The memory saved, minus KSM's records for the process; may be negative."""
    merge_any: bool | None
    """Whether KSM may merge all of QEMU's memory (`run --ksm all`) instead of guest RAM alone."""


class Status(msgspec.Struct, frozen=True):
    """KSM on this host now; bytes, None is unknown.

    While KSM is stopped the kernel does not update its counts. They still include processes that
    have ended and pages that were written to.
    """

    run: int | None
    """0: stopped, merged pages stay; 1: running; 2: stopped, and all merged pages are split."""
    pages_to_scan: int | None
    sleep_millisecs: int | None
    smart_scan: int | None
    advisor_mode: str | None
    shared: int | None
    """Merged pages in memory, each counted once."""
    saved: int | None
    """Further mappings of these, and pages replaced by the zero page."""
    profit: int | None
    """The memory saved, minus KSM's own records; may be negative."""
    unshared: int | None
    """Scanned pages that were unique."""
    volatile: int | None
    """Pages that change too fast to be merged."""
    full_scans: int | None
    cpu_seconds: float | None
    """CPU time of ksmd since the host's boot."""
    unmerge: int | None
    """The most memory that splitting all merged pages would take: what is saved."""
    changed: dict[str, Changed]
    """The settings that onecopy has changed and not restored."""
    guests: tuple[GuestMerging, ...]


def status(guests: Iterable[tuple[str, int]], root: Path = ROOT) -> Status:
    """Return the state of KSM and its work for some guests.

    Args:
        guests: (name, pid) of each; guests that have ended are left out.

    Raises:
        Incompatible: this kernel has no KSM.
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
    """Start KSM with some settings; others stay as they are.

    Args:
        values: setting -> value.

    Raises:
        Incompatible: this kernel has no KSM or lacks a setting.
        NotPermitted: only root may change settings.
        InvalidInput: the kernel refused a value; all old values are restored.
    """
    tune({**values, "run": "1"}, root)


def tune(values: Mapping[str, str], root: Path = ROOT) -> None:
    """Change settings; raise like `turn_on`."""
    _required(root)
    with _locked(root):
        before = _read(root)
        wanted = _updated_record(before, values, root)
        _write(wanted, root)
        try:
            ksm.change(values, root)
        except BaseException:
            _write(before, root)
            raise


def turn_off(root: Path = ROOT, *, unmerge: bool = False) -> list[str]:
    """Restore the original settings, except those that another program has changed.

    Args:
        unmerge: also split all merged pages; otherwise they stay merged until they are written to.

    Returns:
        The settings that another program has changed.

    Raises:
        Incompatible: this kernel has no KSM.
        NotPermitted: only root may change settings.
        InsufficientResources: there is not enough memory to split the pages.
        InvalidInput: KSM ran before, so that it would merge the pages again.
    """
    now = _required(root)
    with _locked(root):
        changed = _read(root)
        if unmerge:
            _split_pages(now, changed, root)
        others = []
        for name in sorted(changed, key=_rank):
            each, current = changed[name], ksm.setting(name, root)
            split = unmerge and name == "run"
            if current not in (each.set, each.found) and each.set is not None and not split:
                others.append(name)
            elif current != each.found:
                ksm.write(name, each.found, root)
        _write({}, root)
        return others


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _split_pages(now: Ksm, changed: Mapping[str, Changed], root: Path) -> None:
    if "run" in changed and changed["run"].found == "1":
        raise InvalidInput(
            "KSM was running before onecopy changed it, and would merge all pages again",
            hint="omit --unmerge",
        )
    needed = _saved(now) or 0
    available = meminfo.read(root).available
    if available is not None and needed > available:
        raise InsufficientResources(
            "memory", needed=needed, available=available, hint="stop some guests first"
        )
    ksm.write("run", "2", root)


def _updated_record(
    before: Mapping[str, Changed], values: Mapping[str, str], root: Path
) -> dict[str, Changed]:
    """Return the record for the time when ``values`` are set.

    Raises:
        Incompatible: this kernel lacks a setting.
    """
    record = dict(before)
    wanted: dict[str, str | None] = dict(values)
    if "advisor_mode" in values:
        wanted.setdefault("pages_to_scan", None)
    for name, value in wanted.items():
        current = ksm.required(name, root)
        found = record[name].found if name in record else current
        record[name] = Changed(found, value)
    return record


def _required(root: Path) -> Ksm:
    now = ksm.read(root)
    if now is None:
        raise Incompatible(
            "this kernel has no KSM", hint="use a kernel that was built with CONFIG_KSM"
        )
    return now


def _guest(name: str, pid: int, root: Path) -> GuestMerging | None:
    try:
        counters = ksm.read_process(pid, root)
    except NotFound:
        return None
    except (NotPermitted, Unreadable):
        counters = ProcessKsm(None, None, None, None)
    merged = _bytes(counters.merging_pages, counters.zero_pages)
    return GuestMerging(name, pid, merged, counters.profit, counters.merge_any)


def _cpu_seconds(thread: int | None, root: Path) -> float | None:
    with suppress(NotFound):
        return None if thread is None else process.cpu_seconds(thread, root)
    return None


def _saved(now: Ksm) -> int | None:
    return _bytes(now.pages_sharing, now.ksm_zero_pages)


def _bytes(pages: int | None, zero_pages: int | None = None) -> int | None:
    """Return the bytes of pages, and of zero pages if the kernel reports them."""
    return None if pages is None else (pages + (zero_pages or 0)) * PAGE_SIZE


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Allow one command at a time to change the settings and the record.

    Raises:
        NotPermitted: this user may not write there.
    """
    directory = root / _DIRECTORY
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with locked_blocking(directory / "ksm.lock"):
            yield
    except PermissionError as error:
        raise not_permitted(directory) from error


def _read(root: Path) -> dict[str, Changed]:
    try:
        data = (root / _DIRECTORY / _RECORD).read_bytes()
    except FileNotFoundError:
        return {}
    return msgspec.json.decode(data, type=dict[str, Changed])


def _write(changed: Mapping[str, Changed], root: Path) -> None:
    path = root / _DIRECTORY / _RECORD
    if not changed:
        with suppress(FileNotFoundError):
            path.unlink()
        return
    files.replace(path, msgspec.json.encode(changed))
