"""/proc/PID/smaps: every mapping of a process, and what of it is in memory.

The fields are the kernel's: Documentation/filesystems/proc.rst, "/proc/PID/smaps". Not here:
which mapping is the guest's RAM (``onecopy.sharing.account``).
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from onecopy.errors import Incompatible, Unreadable
from onecopy.linux.files import ROOT, no_process, read_of_process

_BLOCK = re.compile(
    rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([-a-z]{4}) ([0-9a-f]{1,16}) ([0-9a-f:]{1,20}) "
    rb"([0-9]{1,20}) *(.*)\n((?:[A-Z].*\n)*)",
    re.MULTILINE,
)
_PSS = re.compile(rb"^Pss_(Anon|Shmem|File): +([0-9]{1,15}) kB$", re.MULTILINE)
#: Of 65,530 mappings, which vm.max_map_count allows, there are 50 MiB.
_MOST = 128 << 20
_PSS_KINDS = (b"Anon", b"Shmem", b"File")
#: What each kernel has, in the order of Mapping's fields.
_FIGURES = (
    b"Rss:",
    b"Pss:",
    b"Shared_Clean:",
    b"Shared_Dirty:",
    b"Private_Clean:",
    b"Private_Dirty:",
    b"Anonymous:",
    b"Swap:",
)
#: Not there where the kernel has no such pages.
_HUGE = (
    (b"AnonHugePages:",),
    (b"ShmemPmdMapped:", b"FilePmdMapped:"),
    (b"Private_Hugetlb:",),
    (b"Shared_Hugetlb:",),
)


class Mapping(msgspec.Struct, frozen=True, gc=False):
    """One mapping (VMA). All sizes are bytes.

    The kernel leaves hugetlb pages out of ``rss``, its parts and ``pss``; ``private``, ``shared``
    and ``resident`` have them in.
    """

    start: int
    end: int
    #: ``rwxp`` or ``rwxs``, with ``-`` for what is not allowed; p private, s shared.
    perms: str
    offset: int
    #: ``MAJOR:MINOR`` in hexadecimal, as the kernel writes it.
    device: str
    inode: int
    #: As the kernel writes it: empty when anonymous, `` (deleted)`` at its end when unlinked.
    path: str
    rss: int
    pss: int
    shared_clean: int
    shared_dirty: int
    private_clean: int
    private_dirty: int
    anonymous: int
    swap: int
    #: None when this kernel does not tell.
    ksm: int | None
    #: In huge pages: anonymous, and page cache or shared memory.
    anon_huge: int
    file_huge: int
    #: Pages of hugetlbfs or a hugetlb memfd that only this process maps, and the others.
    hugetlb_private: int
    hugetlb_shared: int

    @property
    def size(self) -> int:
        """Bytes of address space."""
        return self.end - self.start

    @property
    def private(self) -> int:
        """Bytes in memory that no other process maps."""
        return self.private_clean + self.private_dirty + self.hugetlb_private

    @property
    def shared(self) -> int:
        """Bytes in memory that another process maps too."""
        return self.shared_clean + self.shared_dirty + self.hugetlb_shared

    @property
    def resident(self) -> int:
        """Bytes in memory."""
        return self.rss + self.hugetlb_private + self.hugetlb_shared

    @property
    def huge(self) -> int:
        """Bytes in huge pages of any kind."""
        return self.anon_huge + self.file_huge + self.hugetlb_private + self.hugetlb_shared


def parse(text: bytes) -> list[Mapping]:
    """All mappings in the text of an smaps file, in address order.

    Raises Incompatible when the kernel left out a field that every kernel since 4.14 has, and
    Unreadable when the text is cut off.
    """
    found: list[Mapping] = []
    try:
        found.extend(map(_mapping, _BLOCK.finditer(text)))
    except KeyError as error:
        if found:
            raise Unreadable("a memory map is cut off") from error
        raise Incompatible(
            f"this kernel's smaps has no {error.args[0].decode()[:-1]} field",
            hint="onecopy needs a kernel with CONFIG_PROC_PAGE_MONITOR",
        ) from error
    except ValueError as error:
        raise Unreadable("a memory map has figures that are none") from error
    if text and not (text.endswith(b"\n") and found):
        raise Unreadable("a memory map is cut off")
    return found


def _mapping(match: re.Match[bytes]) -> Mapping:
    start, end, perms, offset, device, inode, path, body = match.groups()
    return Mapping(
        int(start, 16),
        int(end, 16),
        perms.decode(),
        int(offset, 16),
        device.decode(),
        int(inode),
        # seq_path() escapes the newline, and only that.
        path.replace(rb"\012", b"\n").decode(errors="surrogateescape"),
        *_figures(body[body.find(b"\nRss:") :]),
    )


@lru_cache(maxsize=4096)  # guests are alike, and so most texts are those of another
def _figures(text: bytes) -> tuple[Any, ...]:
    """The fields of a Mapping from ``rss`` on."""
    # "Rss:", "4", "kB" and so on: what has no unit comes last, and is none of ours.
    words = text.split()
    kib = dict(zip(words[::3], words[1::3], strict=False))
    ksm = kib.get(b"KSM:")
    return (
        *(int(kib[name]) << 10 for name in _FIGURES),
        None if ksm is None else int(ksm) << 10,
        *(sum(int(kib.get(name, 0)) << 10 for name in names) for names in _HUGE),
    )


class Rollup(msgspec.Struct, frozen=True):
    """A process's proportional share of pages in memory by kind, in bytes (Linux 5.4)."""

    anonymous: int
    shared_memory: int
    """tmpfs, memory files and shared anonymous memory."""
    files: int


def read_rollup(pid: int, root: Path = ROOT) -> Rollup | None:
    """The kernel's own sums; None when it does not tell them.

    Raises NotFound when the process is gone or a zombie, NotPermitted, Unreadable.
    """
    text = read_of_process(pid, "smaps_rollup", root)
    if text is None:
        return None
    if not text:
        raise no_process(pid)
    kib = dict(_PSS.findall(text))
    if len(kib) < len(_PSS_KINDS):
        return None
    return Rollup(*(int(kib[kind]) << 10 for kind in _PSS_KINDS))


def read(pid: int, root: Path = ROOT, most: int = _MOST) -> list[Mapping]:
    """All mappings of a process, in address order, if their text has no more than ``most`` bytes.

    Raises NotFound when the process is gone or a zombie, NotPermitted without ptrace rights over
    it (ptrace(2), PTRACE_MODE_READ), Unreadable, and Incompatible as ``parse`` does.
    """
    text = read_of_process(pid, "smaps", root, most=most)
    if text is None:
        raise Incompatible(
            "this kernel has no /proc/PID/smaps",
            hint="onecopy needs a kernel with CONFIG_PROC_PAGE_MONITOR",
        )
    if not text:
        raise no_process(pid)
    return parse(text)
