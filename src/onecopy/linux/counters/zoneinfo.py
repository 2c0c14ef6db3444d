"""/proc/zoneinfo: free pages that /proc/meminfo leaves out.

Each CPU keeps lists of free pages, which since Linux 6.7 may grow large (``high_max``;
mm/page_alloc.c, pcp->high). MemFree does not count these pages: where a big process has just ended
they are hundreds of MiB, and what is taken next makes MemFree fall by so much less.
"""

from __future__ import annotations

import re
from pathlib import Path

from onecopy.linux.files import ROOT
from onecopy.linux.files import read as read_file
from onecopy.model import PAGE_SIZE

_COUNT = re.compile(rb"^ +count: +([0-9]{1,15})$", re.MULTILINE)


def free_on_lists(root: Path = ROOT) -> int | None:
    """Bytes free on the CPUs' lists; None when this kernel does not tell. Raises NotPermitted."""
    text = read_file(root / "proc/zoneinfo")
    return None if text is None else sum(map(int, _COUNT.findall(text))) * PAGE_SIZE
