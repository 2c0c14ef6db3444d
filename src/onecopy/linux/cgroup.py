"""Control groups of version 2: a limit on all that one VMM has, below a group of ours.

Linux Documentation/admin-guide/cgroup-v2.rst. Root makes its groups below the topmost one; an
ordinary user where systemd, or whoever owns the tree, has delegated one. Moving a process takes the
kernel some 10 ms (it waits until nobody forks): never on the way of a start. The standard library
alone. Not here: limits on one process (linux/sandbox/rlimits.py), how much a VMM needs
(vmm/vmm_limits.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

# Nothing of ours is imported: this file alone is tried out in a guest (tests/vm/test_cgroup.py).

_OURS = "onecopy"
_NEEDED = ("memory", "pids")
#: How often a group is made again that a sweep took for one whose VMM is gone.
_TRIES = 3


def why_not(root: Path = Path("/")) -> str:
    """What keeps us from having groups; "" if nothing does."""
    mount = _mount(root)
    if mount is None:
        return "there is no cgroup2 file system"
    if not _has_controllers(mount):
        return "cgroup version 2 has no memory and pids controllers here (they are version 1's)"
    if ours(root) is None:
        return "no cgroup was delegated to this user (systemd-run --user --scope gives one)"
    return ""


def ours(root: Path = Path("/")) -> Path | None:
    """The group that ours are in, made if need be; None if there cannot be one."""
    for group in _above(root):
        if _can_have(group):
            with contextlib.suppress(OSError):
                mine = group / _OURS
                mine.mkdir(mode=0o755, exist_ok=True)
                if _can_have(mine):
                    return mine
    return None


def create(pid: int, memory: int, threads: int, root: Path = Path("/")) -> Path | None:
    """Limit process ``pid`` to bytes of memory, its page cache included, and to threads.

    Returns its group; None where there can be none, or the process is gone.
    """
    above = ours(root)
    if above is None:
        return None
    for _ in range(_TRIES):
        group = above / f"{pid}-{secrets.token_hex(8)}"
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


def let_have(pid: int, memory: int, root: Path = Path("/")) -> None:
    """Let a process that has a group of ours have so many bytes of memory more."""
    group = of(pid, root)
    if group:
        with contextlib.suppress(OSError, ValueError):
            limit = int((group / "memory.max").read_text())
            (group / "memory.max").write_text(str(limit + memory))


def of(pid: int, root: Path = Path("/")) -> Path | None:
    """The group of ours that a process is in; None if it is in none."""
    mount = _mount(root)
    path = _path(root / f"proc/{pid}/cgroup")
    if mount and path and path.parent.name == _OURS:
        return mount / path.relative_to("/")
    return None


def processes(root: Path = Path("/")) -> dict[int, Path]:
    """The processes that are in groups of ours, and in which one."""
    found: dict[int, Path] = {}
    for group in _groups(root):
        with contextlib.suppress(OSError):
            found |= {int(pid): group for pid in (group / "cgroup.procs").read_text().split()}
    return found


def was_short_of_memory(pid: int, root: Path = Path("/")) -> bool:
    """Whether the kernel killed, for memory, a process that had a group of ours; until `sweep`.

    The kernel counts all kills in a group, also those for the memory of the whole host.
    """
    for group in _groups(root):
        with contextlib.suppress(OSError):
            if group.name.startswith(f"{pid}-") and not (group / "cgroup.procs").read_text():
                events = (group / "memory.events").read_text()
                if re.search(r"^oom_kill [1-9]", events, re.MULTILINE):
                    return True
    return False


def remove(group: Path) -> None:
    """Remove a group whose process is gone; the kernel keeps any other."""
    with contextlib.suppress(OSError):
        group.rmdir()


def sweep(root: Path = Path("/")) -> None:
    """Remove groups whose processes are gone; the kernel keeps the others."""
    for group in _groups(root):
        remove(group)


def _groups(root: Path) -> list[Path]:
    found = []
    for group in _above(root):
        with contextlib.suppress(OSError):
            found += [each for each in (group / _OURS).iterdir() if each.is_dir()]
    return found


def _above(root: Path) -> list[Path]:
    """The groups that we are in, from the topmost on."""
    mount, path = _mount(root), _path(root / "proc/self/cgroup")
    if mount is None or path is None:
        return []
    found = [mount, *(mount / each.relative_to("/") for each in reversed(path.parents))]
    found.append(mount / path.relative_to("/"))
    return list(dict.fromkeys(found))


def _path(file: Path) -> Path | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^0::(/.*)$", _text(file), re.MULTILINE)
        # Outside of what a container sees.
        if match and ".." not in match[1]:
            return Path(match[1])
    return None


def _mount(root: Path) -> Path | None:
    with contextlib.suppress(OSError):
        for line in _text(root / "proc/self/mountinfo").split("\n"):
            place, _, kind = line.partition(" - ")
            if kind.startswith("cgroup2 "):
                path = re.sub(
                    r"\\([0-7]{3})", lambda each: chr(int(each[1], 8)), place.split(" ")[4]
                )
                return root / Path(path).relative_to("/")
    return None


def _text(file: Path) -> str:
    """Names in it may be of any bytes."""
    return os.fsdecode(file.read_bytes())


def _has_controllers(group: Path) -> bool:
    with contextlib.suppress(OSError):
        there = (group / "cgroup.controllers").read_text().split()
        return all(each in there for each in _NEEDED)
    return False


def _can_have(group: Path) -> bool:
    """Whether groups below this one have the controllers, which is made so if it can be."""
    control = group / "cgroup.subtree_control"
    if not os.access(group, os.W_OK) or not _has_controllers(group):
        return False
    with contextlib.suppress(OSError):
        there = control.read_text().split()
        missing = [each for each in _NEEDED if each not in there]
        # Refused where processes are: only the topmost group may have both.
        if missing:
            control.write_text(" ".join(f"+{each}" for each in missing))
        return True
    return False
