"""Kernel samepage merging: counters and settings of the host and of one process.

Not here: when KSM is worth its CPU time.

Source:
    Linux Documentation/admin-guide/mm/ksm.rst (/sys/kernel/mm/ksm), filesystems/proc.rst
    (/proc/PID/ksm_stat, ksm_merging_pages).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible, InvalidInput, NotFound, NotPermitted, Unreadable
from onecopy.linux import process
from onecopy.linux.files import ROOT, not_permitted, number, read_number, read_of_process
from onecopy.linux.files import read as read_file

_DIRECTORY = "sys/kernel/mm/ksm"
_SELECTED = re.compile(r"\[(\S+)\]")


class Ksm(msgspec.Struct, frozen=True):
    """The host's KSM, with counters in pages; None is a value that this kernel does not report."""

    #: 0: stopped, merged pages stay; 1: running; 2: stopped, and all merged pages are split.
    run: int | None
    pages_to_scan: int | None
    sleep_millisecs: int | None
    #: 1: pages that never merge are scanned less often.
    smart_scan: int | None
    #: ``none`` or ``scan-time``: what chooses pages_to_scan.
    advisor_mode: str | None
    #: Merged pages in memory, each mapped at several places.
    pages_shared: int | None
    #: Mappings of them beyond the first: the pages saved.
    pages_sharing: int | None
    pages_unshared: int | None
    pages_volatile: int | None
    full_scans: int | None
    #: Pages replaced by the kernel's zero page; not in the counters above.
    ksm_zero_pages: int | None
    #: Bytes saved minus KSM's own memory; may be negative.
    general_profit: int | None


class ProcessKsm(msgspec.Struct, frozen=True):
    """The work of KSM on one process; None is a value that this kernel does not report."""

    #: Merged pages of the process.
    merging_pages: int | None
    zero_pages: int | None
    #: Bytes saved minus KSM's memory for the process; may be negative.
    profit: int | None
    #: Whether all its memory may be merged: prctl(2), PR_SET_MEMORY_MERGE.
    merge_any: bool | None


def read(root: Path = ROOT) -> Ksm | None:
    """Return the state of the host's KSM; None if this kernel has none (CONFIG_KSM)."""
    directory = root / _DIRECTORY
    if not directory.is_dir():
        return None
    numbers = {
        name: read_number(directory / name)
        for name in Ksm.__struct_fields__
        if name != "advisor_mode"
    }
    return Ksm(advisor_mode=setting("advisor_mode", root), **numbers)


def thorough(root: Path = ROOT) -> dict[str, int | str]:
    """Return the settings that make each scan visit every page; empty if all scans do.

    smart_scan skips old pages in most scans. It may skip two equal pages at different times, so
    that they never merge.
    """
    return {"smart_scan": 0} if (root / _DIRECTORY / "smart_scan").exists() else {}


def setting(name: str, root: Path = ROOT) -> str | None:
    """Return a setting in the form in which it is written; None if this kernel does not have it."""
    # Of ``none [scan-time]``, this is the word in brackets.
    data = read_file(root / _DIRECTORY / name)
    if data is None:
        return None
    text = data.decode(errors="replace").strip()
    selected = _SELECTED.search(text)
    return selected[1] if selected else text


def required(name: str, root: Path = ROOT) -> str:
    """Return a setting in the form in which it is written.

    Raises:
        Incompatible: this kernel does not have it.
    """
    found = setting(name, root)
    if found is None:
        raise Incompatible(f"this kernel's KSM has no {name}", hint="omit this setting")
    return found


@contextmanager
def settings(values: Mapping[str, int | str], root: Path = ROOT) -> Iterator[None]:
    """Set files of /sys/kernel/mm/ksm, and restore the old values at the end of the context.

    The settings apply to the whole host. They are written in order.

    Raises:
        Incompatible: this kernel lacks one; those that were set are restored.
        NotPermitted: only root may write them.
        InvalidInput: the kernel refused a value; those that were set are restored.
    """
    with ExitStack() as restore:
        _set(values, root, restore)
        yield


def change(values: Mapping[str, int | str], root: Path = ROOT) -> None:
    """Write all ``values`` in order, or none; raise like `settings`."""
    with ExitStack() as restore:
        _set(values, root, restore)
        restore.pop_all()


def _set(values: Mapping[str, int | str], root: Path, restore: ExitStack) -> None:
    for name, value in values.items():
        old = required(name, root)
        write(name, value, root)
        restore.callback(write, name, old, root)


def write(name: str, value: int | str, root: Path = ROOT) -> None:
    """Write a setting that exists.

    Raises:
        NotPermitted: only root may write it.
        InvalidInput: the kernel refused the value.
    """
    path = root / _DIRECTORY / name
    try:
        path.write_text(str(value))
    except PermissionError as error:
        raise not_permitted(path) from error
    except OSError as error:
        raise InvalidInput(
            f"the kernel refused the value {value} for {path}: {error.strerror}",
            hint="see Linux Documentation/admin-guide/mm/ksm.rst; pages_to_scan needs "
            "advisor_mode none",
        ) from error


def thread(root: Path = ROOT) -> int | None:
    """Return the process id of ksmd, the kernel thread that merges; None if it is not visible."""
    for path in (root / "proc").glob("[0-9]*/comm"):
        pid = int(path.parent.name)
        # Any process can take this name, or one that is not text.
        with suppress(OSError, NotFound, NotPermitted, Unreadable):
            if path.read_bytes() == b"ksmd\n" and process.stat(pid, root).is_kernel_thread:
                return pid
    return None


def parse_process(text: bytes) -> dict[str, str]:
    """Parse /proc/PID/ksm_stat, with lines ``NAME VALUE`` or ``NAME: VALUE``."""
    lines = (line.split() for line in text.decode(errors="replace").splitlines())
    return {words[0].rstrip(":"): words[1] for words in lines if len(words) == 2}


def read_process(pid: int, root: Path = ROOT) -> ProcessKsm:
    """Return the work of KSM on one process; all values are None for a process that is ending.

    Raises:
        NotFound: the process does not exist.
        NotPermitted: this user may not trace the process.
        Unreadable: the kernel refused to read the file.
    """
    values = parse_process(read_of_process(pid, "ksm_stat", root) or b"")
    merging = number(values.get("ksm_merging_pages"))
    if merging is None:
        # Older kernels have no ksm_stat, or one with fewer lines.
        merging = number(read_of_process(pid, "ksm_merging_pages", root))
    merge_any = values.get("ksm_merge_any")
    return ProcessKsm(
        merging_pages=merging,
        zero_pages=number(values.get("ksm_zero_pages")),
        profit=number(values.get("ksm_process_profit")),
        merge_any=None if merge_any is None else merge_any == "yes",
    )
