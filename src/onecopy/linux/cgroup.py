"""Limit all resources of one VMM with a control group of version 2.

Root's groups are below the topmost group. An ordinary user's are below a group that systemd or the
owner of the tree has delegated. Moving a process into a group takes the kernel about 10 ms, because
it waits until no process forks. So no start of a guest waits for that.

Not here: limits on one process (linux/sandbox/rlimits.py), and how much a VMM needs
(vmm/vmm_limits.py).

Source:
    Linux Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

# This file imports nothing of onecopy: a test runs it alone in a guest (tests/vm/test_cgroup.py).

_GROUP = "onecopy"
_NEEDED = ("memory", "pids")
#: How often to create a group again after a concurrent sweep removed it while it was empty.
_TRIES = 3


def why_not(root: Path = Path("/")) -> str:
    """Return the reason why this process cannot create groups; "" if it can."""
    mount = _mount(root)
    if mount is None:
        return "no cgroup2 file system is mounted"
    if not _has_controllers(mount):
        return (
            "cgroup version 2 has no memory and pids controllers on this host (version 1 has them)"
        )
    if ours(root) is None:
        return "no cgroup is delegated to this user (systemd-run --user --scope delegates one)"
    return ""


def ours(root: Path = Path("/")) -> Path | None:
    """Return the parent of onecopy's groups, created if missing; None if impossible."""
    for group in _own_groups(root):
        if _enable_controllers(group):
            with contextlib.suppress(OSError):
                mine = group / _GROUP
                mine.mkdir(mode=0o755, exist_ok=True)
                if _enable_controllers(mine):
                    return mine
    return None


def create(pid: int, memory: int, threads: int, root: Path = Path("/")) -> Path | None:
    """Limit a process with a new group.

    Args:
        memory: bytes, page cache included.
        threads: the number of threads.

    Returns:
        The group; None if groups are not available or the process has ended.
    """
    above = ours(root)
    if above is None:
        return None
    for _ in range(_TRIES):
        group = above / f"{pid}-{os.urandom(8).hex()}"
        try:
            group.mkdir(mode=0o755)
            (group / "memory.max").write_text(str(memory))
            (group / "pids.max").write_text(str(threads))
            (group / "cgroup.procs").write_text(str(pid))
            return group
        except FileNotFoundError:
            continue
        except OSError:
            remove(group)
            return None
    return None


def raise_memory_limit(pid: int, memory: int, root: Path = Path("/")) -> None:
    """Raise the memory limit of a process in an onecopy group by ``memory`` bytes."""
    group = of(pid, root)
    if group:
        with contextlib.suppress(OSError, ValueError):
            limit = int((group / "memory.max").read_text())
            (group / "memory.max").write_text(str(limit + memory))


def of(pid: int, root: Path = Path("/")) -> Path | None:
    """Return the onecopy group that a process is in; None if it is in none."""
    mount = _mount(root)
    path = _parse_own_path(root / f"proc/{pid}/cgroup")
    if mount and path and path.parent.name == _GROUP:
        return mount / path.relative_to("/")
    return None


def processes(root: Path = Path("/")) -> dict[int, Path]:
    """Map each process in an onecopy group to its group."""
    found: dict[int, Path] = {}
    for group in _groups(root):
        with contextlib.suppress(OSError):
            found |= {int(pid): group for pid in (group / "cgroup.procs").read_text().split()}
    return found


def was_short_of_memory(pid: int, root: Path = Path("/")) -> bool:
    """Whether the kernel killed a process with an onecopy group because memory ran out.

    The kernel counts all kills in a group, also those for lack of memory on the whole host. The
    answer is available until the next `sweep`.
    """
    for group in _groups(root):
        with contextlib.suppress(OSError):
            if group.name.startswith(f"{pid}-") and not (group / "cgroup.procs").read_text():
                events = (group / "memory.events").read_text()
                if re.search(r"^oom_kill [1-9]", events, re.MULTILINE):
                    return True
    return False


def remove(group: Path) -> None:
    """Remove a group whose process has ended; the kernel keeps a group that is in use."""
    with contextlib.suppress(OSError):
        group.rmdir()


def sweep(root: Path = Path("/")) -> None:
    """Remove all groups whose processes have ended; the kernel keeps groups that are in use."""
    for group in _groups(root):
        remove(group)


def _groups(root: Path) -> list[Path]:
    found = []
    for group in _own_groups(root):
        with contextlib.suppress(OSError):
            found += [each for each in (group / _GROUP).iterdir() if each.is_dir()]
    return found


def _own_groups(root: Path) -> list[Path]:
    """List the groups that contain this process, the topmost first."""
    mount, path = _mount(root), _parse_own_path(root / "proc/self/cgroup")
    if mount is None or path is None:
        return []
    found = [mount, *(mount / each.relative_to("/") for each in reversed(path.parents))]
    found.append(mount / path.relative_to("/"))
    return list(dict.fromkeys(found))


def _parse_own_path(file: Path) -> Path | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^0::(/.*)$", _read_text(file), re.MULTILINE)
        # A path with ".." is outside of the container's cgroup namespace.
        if match and ".." not in match[1]:
            return Path(match[1])
    return None


def _mount(root: Path) -> Path | None:
    with contextlib.suppress(OSError):
        for line in _read_text(root / "proc/self/mountinfo").split("\n"):
            place, _, kind = line.partition(" - ")
            if kind.startswith("cgroup2 "):
                path = re.sub(
                    r"\\([0-7]{3})", lambda each: chr(int(each[1], 8)), place.split(" ")[4]
                )
                return root / Path(path).relative_to("/")
    return None


def _read_text(file: Path) -> str:
    """Read a file in which names may contain any bytes."""
    return os.fsdecode(file.read_bytes())


def _has_controllers(group: Path) -> bool:
    with contextlib.suppress(OSError):
        there = (group / "cgroup.controllers").read_text().split()
        return all(each in there for each in _NEEDED)
    return False


def _enable_controllers(group: Path) -> bool:
    """Whether the group passes the controllers on to its children; enable that if possible."""
    control = group / "cgroup.subtree_control"
    if not os.access(group, os.W_OK) or not _has_controllers(group):
        return False
    with contextlib.suppress(OSError):
        there = control.read_text().split()
        missing = [each for each in _NEEDED if each not in there]
        # The kernel refuses this for a group with processes, except for the topmost group.
        if missing:
            control.write_text(" ".join(f"+{each}" for each in missing))
        return True
    return False
