"""/proc/PID/smaps: the mappings of a process and their memory.

Not here: which mapping is the guest's RAM (``onecopy.sharing.account``).

Source:
    Linux Documentation/filesystems/proc.rst, "/proc/PID/smaps".
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
#: The 65,530 mappings that vm.max_map_count allows take 50 MiB.
_LARGEST = 128 << 20
_PSS_KINDS = (b"Anon", b"Shmem", b"File")
#: Fields that every kernel has, in the order of Mapping's.
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
#: Fields that a kernel without such pages leaves out.
_HUGE = (
    (b"AnonHugePages:",),
    (b"ShmemPmdMapped:", b"FilePmdMapped:"),
    (b"Private_Hugetlb:",),
    (b"Shared_Hugetlb:",),
)


class Mapping(msgspec.Struct, frozen=True, gc=False):
    """A mapping (VMA); all sizes are in bytes.

    The kernel leaves hugetlb pages out of ``rss``, its parts and ``pss``. The properties
    ``private``, ``shared`` and ``resident`` include them.
    """

    start: int
    end: int
    #: ``rwxp`` or ``rwxs``, with ``-`` for a missing permission; p is private, s shared.
    perms: str
    offset: int
    #: ``MAJOR:MINOR`` in hexadecimal, as the kernel formats it.
    device: str
    inode: int
    #: As the kernel formats it: empty if anonymous, followed by `` (deleted)`` if unlinked.
    path: str
    rss: int
    pss: int
    shared_clean: int
    shared_dirty: int
    private_clean: int
    private_dirty: int
    anonymous: int
    swap: int
    #: None if this kernel does not report it.
    ksm: int | None
    #: In huge pages: anonymous memory; page cache and shared memory.
    anon_huge: int
    file_huge: int
    #: Pages of hugetlbfs or a hugetlb memfd: mapped by this process alone; by others too.
    hugetlb_private: int
    hugetlb_shared: int

    @property
    def size(self) -> int:
        """The size of the address range."""
        return self.end - self.start

    @property
    def private(self) -> int:
        """Bytes in memory that no other process maps."""
        return self.private_clean + self.private_dirty + self.hugetlb_private

    @property
    def shared(self) -> int:
        """Bytes in memory that other processes map too."""
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
    """Parse an smaps file.

    Returns:
        All mappings in the order of their addresses.

    Raises:
        Incompatible: the kernel lacks a field that every kernel since 4.14 has.
        Unreadable: the text is cut off or malformed.
    """
    found: list[Mapping] = []
    try:
        found.extend(map(_mapping, _BLOCK.finditer(text)))
    except KeyError as error:
        if found:
            raise Unreadable(
                "the kernel's report on a process's mappings (smaps) is cut off"
            ) from error
        raise Incompatible(
            f"this kernel's smaps has no {error.args[0].decode()[:-1]} field",
            hint="onecopy needs a kernel with CONFIG_PROC_PAGE_MONITOR",
        ) from error
    except ValueError as error:
        raise Unreadable(
            "the kernel's report on a process's mappings (smaps) contains an invalid number"
        ) from error
    if text and not (text.endswith(b"\n") and found):
        raise Unreadable("the kernel's report on a process's mappings (smaps) is cut off")
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
        # seq_path() escapes newlines and nothing else.
        path.replace(rb"\012", b"\n").decode(errors="surrogateescape"),
        *_figures(body[body.find(b"\nRss:") :]),
    )


@lru_cache(maxsize=4096)  # guests are alike, so most texts occur again
def _figures(text: bytes) -> tuple[Any, ...]:
    """Parse the fields of a Mapping from ``rss`` on."""
    # The words are "Rss:", "4", "kB" and so on. Fields without a unit come last and are not used.
    words = text.split()
    kib = dict(zip(words[::3], words[1::3], strict=False))
    ksm = kib.get(b"KSM:")
    return (
        *(int(kib[name]) << 10 for name in _FIGURES),
        None if ksm is None else int(ksm) << 10,
        *(sum(int(kib.get(name, 0)) << 10 for name in names) for names in _HUGE),
    )


class Rollup(msgspec.Struct, frozen=True):
    """A process's proportional set size by kind, in bytes (Linux 5.4)."""

    anonymous: int
    shared_memory: int
    """tmpfs, memory files and shared anonymous memory."""
    files: int


def read_rollup(pid: int, root: Path = ROOT) -> Rollup | None:
    """Read the kernel's own totals for a process.

    Returns:
        None if this kernel does not report them.

    Raises:
        NotFound: the process has ended or is a zombie.
        NotPermitted: this user may not trace the process.
        Unreadable: the kernel refused to read the file.
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


def read(pid: int, root: Path = ROOT, most: int = _LARGEST) -> list[Mapping]:
    """Read all mappings of a process in the order of their addresses.

    Args:
        most: the limit on the size of the file in bytes.

    Raises:
        NotFound: the process has ended or is a zombie.
        NotPermitted: this user may not trace the process (ptrace(2), PTRACE_MODE_READ).
        Unreadable: the file is too large, cut off or malformed.
        Incompatible: this kernel lacks the file or a field.
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
