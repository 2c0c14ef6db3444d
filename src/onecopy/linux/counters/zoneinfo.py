"""/proc/zoneinfo: free pages that /proc/meminfo leaves out.

Each CPU keeps lists of free pages, which can be long since Linux 6.7 (``high_max``;
mm/page_alloc.c, pcp->high). MemFree does not count them. After the end of a large process they
amount to hundreds of MiB. Allocations from these lists then do not reduce MemFree.
"""

from __future__ import annotations

import re
from pathlib import Path

from onecopy.linux.files import ROOT
from onecopy.linux.files import read as read_file
from onecopy.model import PAGE_SIZE

_COUNT = re.compile(rb"^ +count: +([0-9]{1,15})$", re.MULTILINE)


def free_on_lists(root: Path = ROOT) -> int | None:
    """Return the bytes of free pages on the CPUs' lists.

    Returns:
        None if this kernel does not report them.

    Raises:
        NotPermitted: this user may not read the file.
    """
    text = read_file(root / "proc/zoneinfo")
    return None if text is None else sum(map(int, _COUNT.findall(text))) * PAGE_SIZE
