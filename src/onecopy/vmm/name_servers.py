"""The host's name servers, which QEMU's user-mode network reads, and nothing that lies beside them.

libslirp reads /etc/resolv.conf again when that has changed, and such a file is replaced, not
rewritten: a rule for the file would be lost then, and one for its folder opens all of /etc. Where
it is a link to a folder of its own, as systemd-resolved has it, that folder is allowed. Else a VMM
that root starts has another folder in place of /etc, in a mount namespace of its own, with a copy
that commands keep fresh. (The file alone will not do: what is mounted on a file goes when that is
replaced, in all namespaces.) Not here: the rules themselves (confine.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from onecopy.linux.syscall import bind_mount, unshare_mounts

_ETC = Path("/etc")
_FILE = "resolv.conf"
#: What QEMU is started with: where libraries are, and the folder of links that lead to some.
_LIBRARIES, _LINKS = "ld.so.cache", "alternatives"
#: Bytes of name servers: more is of no use.
_MOST = 1 << 16


def folder() -> Path:
    """Where the file lies."""
    return (_ETC / _FILE).resolve().parent


def opens_more() -> bool:
    """Whether its folder has other things in it."""
    return folder() == _ETC.resolve()


def stand_in(run: Path) -> Path | None:
    """What VMMs are to have in place of /etc; None if they need nothing, or can have nothing.

    It is there for all guests of a run folder. Raises OSError.
    """
    if not opens_more() or not (_ETC / _FILE).exists() or not can_hide():
        return None
    path = _stand_in(run)
    path.mkdir(exist_ok=True)
    path.chmod(0o755)
    _copy(_FILE, path, os.O_CREAT)
    with contextlib.suppress(FileNotFoundError):
        _copy(_LIBRARIES, path, os.O_CREAT)
    if (_ETC / _LINKS).is_dir():
        (path / _LINKS).mkdir(exist_ok=True)
    return path


def refresh(run: Path) -> None:
    """Let VMMs that have a copy see what name servers the host has now."""
    with contextlib.suppress(OSError):
        _copy(_FILE, _stand_in(run), 0)


def forget(run: Path) -> None:
    """Remove what no VMM has any more."""
    shutil.rmtree(_stand_in(run), ignore_errors=True)


def hide(stand_in: Path) -> None:
    """Have it in place of /etc, from now on and in this thread; raise OSError."""
    unshare_mounts()
    if (stand_in / _LINKS).is_dir():
        bind_mount(_ETC / _LINKS, stand_in / _LINKS)
    bind_mount(stand_in, _ETC)


def can_hide() -> bool:
    """Whether this process may do that."""
    return os.geteuid() == 0 and _may_unshare()


@cache
def _may_unshare() -> bool:
    with ThreadPoolExecutor(1) as one:
        try:
            one.submit(unshare_mounts).result()
        except OSError:
            return False
    return True


def _stand_in(run: Path) -> Path:
    return run / ".etc"


def _copy(name: str, stand_in: Path, flags: int) -> None:
    """Copy a file of /etc in place, if it has changed: VMMs may have it open or read it now."""
    content = (_ETC / name).read_bytes()
    if name == _FILE:
        content = content[:_MOST]
    fd = os.open(stand_in / name, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(fd, 0o644)
        if os.pread(fd, len(content) + 1, 0) != content:
            os.pwrite(fd, content, 0)
            os.ftruncate(fd, len(content))
    finally:
        os.close(fd)
