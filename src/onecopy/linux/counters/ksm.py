"""Kernel samepage merging: its counters and settings, for the host and for one process.

Documentation/admin-guide/mm/ksm.rst (/sys/kernel/mm/ksm) and filesystems/proc.rst
(/proc/PID/ksm_stat, ksm_merging_pages). Not here: when KSM is worth its CPU time.
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

_FOLDER = "sys/kernel/mm/ksm"
_CHOSEN = re.compile(r"\[(\S+)\]")


class Ksm(msgspec.Struct, frozen=True):
    """The host's KSM, counters in pages; None is what this kernel does not tell."""

    #: 0 stopped, merged pages stay; 1 running; 2 stopped, and all merged pages torn apart.
    run: int | None
    pages_to_scan: int | None
    sleep_millisecs: int | None
    #: 1 when pages that never merge are scanned less often.
    smart_scan: int | None
    #: ``none`` or ``scan-time``: who chooses pages_to_scan.
    advisor_mode: str | None
    #: Pages kept, each in use at several places.
    pages_shared: int | None
    #: Places that use them beyond the first: what is saved.
    pages_sharing: int | None
    pages_unshared: int | None
    pages_volatile: int | None
    full_scans: int | None
    #: Pages replaced by the kernel's zero page (in no counter above).
    ksm_zero_pages: int | None
    #: Bytes saved less what KSM itself needs; may be negative.
    general_profit: int | None


class ProcessKsm(msgspec.Struct, frozen=True):
    """KSM's work on one process; None is what this kernel does not tell."""

    #: Pages of the process that are merged.
    merging_pages: int | None
    zero_pages: int | None
    #: Bytes saved less what KSM needs for the process; may be negative.
    profit: int | None
    #: All its memory is open to merging: prctl(2), PR_SET_MEMORY_MERGE.
    merge_any: bool | None


def read(root: Path = ROOT) -> Ksm | None:
    """The host's KSM now; None when this kernel has none (CONFIG_KSM)."""
    folder = root / _FOLDER
    if not folder.is_dir():
        return None
    numbers = {
        name: read_number(folder / name) for name in Ksm.__struct_fields__ if name != "advisor_mode"
    }
    return Ksm(advisor_mode=setting("advisor_mode", root), **numbers)


def thorough(root: Path = ROOT) -> dict[str, int | str]:
    """The setting that lets each scan look at every page, where the kernel has another.

    smart_scan skips old pages in most scans, and of two equal ones each at its own time: they may
    never meet.
    """
    return {"smart_scan": 0} if (root / _FOLDER / "smart_scan").exists() else {}


def setting(name: str, root: Path = ROOT) -> str | None:
    """A setting as it is written back; None when this kernel has none of that name."""
    # Of ``none [scan-time]`` only the chosen word.
    data = read_file(root / _FOLDER / name)
    if data is None:
        return None
    text = data.decode(errors="replace").strip()
    chosen = _CHOSEN.search(text)
    return chosen[1] if chosen else text


def required(name: str, root: Path = ROOT) -> str:
    """A setting as it is written back. Raises Incompatible when this kernel has none."""
    found = setting(name, root)
    if found is None:
        raise Incompatible(f"this kernel's KSM has no {name}", hint="leave that setting out")
    return found


@contextmanager
def settings(values: Mapping[str, int | str], root: Path = ROOT) -> Iterator[None]:
    """Hold files of /sys/kernel/mm/ksm at ``values``, set in order; restore the old ones after.

    These are the host's, not one process's. Raises Incompatible when this kernel lacks one,
    NotPermitted, and InvalidInput when it refuses a value; what was set is then restored.
    """
    with ExitStack() as restore:
        _set(values, root, restore)
        yield


def change(values: Mapping[str, int | str], root: Path = ROOT) -> None:
    """Set all ``values``, in order, or none. Raises as `settings` does."""
    with ExitStack() as restore:
        _set(values, root, restore)
        restore.pop_all()


def _set(values: Mapping[str, int | str], root: Path, restore: ExitStack) -> None:
    for name, value in values.items():
        old = required(name, root)
        write(name, value, root)
        restore.callback(write, name, old, root)


def write(name: str, value: int | str, root: Path = ROOT) -> None:
    """Change a setting that there is. Raises NotPermitted, InvalidInput."""
    path = root / _FOLDER / name
    try:
        path.write_text(str(value))
    except PermissionError as error:
        raise not_permitted(path) from error
    except OSError as error:
        raise InvalidInput(
            f"the kernel refused {value} in {path}: {error.strerror}",
            hint="see Documentation/admin-guide/mm/ksm.rst; pages_to_scan needs advisor_mode none",
        ) from error


def thread(root: Path = ROOT) -> int | None:
    """The process id of ksmd, the kernel thread that merges; None when it is not to be seen."""
    for path in (root / "proc").glob("[0-9]*/comm"):
        pid = int(path.parent.name)
        # Any process can take its name, or one that is no text.
        with suppress(OSError, NotFound, NotPermitted, Unreadable):
            if path.read_bytes() == b"ksmd\n" and process.stat(pid, root).is_kernel_thread:
                return pid
    return None


def parse_process(text: bytes) -> dict[str, str]:
    """The lines of /proc/PID/ksm_stat, ``NAME VALUE`` or ``NAME: VALUE``."""
    lines = (line.split() for line in text.decode(errors="replace").splitlines())
    return {words[0].rstrip(":"): words[1] for words in lines if len(words) == 2}


def read_process(pid: int, root: Path = ROOT) -> ProcessKsm:
    """KSM's work on one process; nothing is known of one that is just ending.

    Raises NotFound, NotPermitted without ptrace rights, Unreadable.
    """
    told = parse_process(read_of_process(pid, "ksm_stat", root) or b"")
    merging = number(told.get("ksm_merging_pages"))
    if merging is None:
        # ksm_stat came later, and held fewer lines at first.
        merging = number(read_of_process(pid, "ksm_merging_pages", root))
    merge_any = told.get("ksm_merge_any")
    return ProcessKsm(
        merging_pages=merging,
        zero_pages=number(told.get("ksm_zero_pages")),
        profit=number(told.get("ksm_process_profit")),
        merge_any=None if merge_any is None else merge_any == "yes",
    )
