"""Give QEMU's user-mode network the host's name servers, and no neighbouring files.

libslirp reads /etc/resolv.conf again when it has changed. Such a file is replaced rather than
rewritten, so a Landlock rule for the file would become void. A rule for its directory would open
all of /etc. If the file is a link into a directory of its own, as with systemd-resolved, that
directory is allowed. Otherwise a VMM started by root gets another directory in place of /etc, in a
mount namespace of its own, with a copy that commands keep up to date. (Mounting over the file alone
fails: such a mount disappears in all namespaces when the file is replaced.)

Not here: the Landlock rules (confine.py).
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path

from onecopy.linux.removal import remove_tree
from onecopy.linux.syscall import bind_mount, unshare_mounts

_ETC = Path("/etc")
_FILE = "resolv.conf"
#: Files that the start of QEMU needs: the list of libraries, and the directory of links to some.
_LIBRARIES, _LINKS = "ld.so.cache", "alternatives"
#: The limit on the size of resolv.conf in bytes.
_LARGEST = 1 << 16


def directory() -> Path:
    """Return the directory that contains the file."""
    return (_ETC / _FILE).resolve().parent


def opens_more() -> bool:
    """Whether that directory contains other files too."""
    return directory() == _ETC.resolve()


def stand_in(run: Path) -> Path | None:
    """Create the directory that replaces /etc for the VMMs of a store.

    Returns:
        The directory; None if VMMs do not need it or cannot use it.

    Raises:
        OSError: the directory cannot be written.
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
    """Update the copy for running VMMs."""
    with contextlib.suppress(OSError):
        _copy(_FILE, _stand_in(run), 0)


def forget(run: Path) -> None:
    """Remove the directory when no VMM uses it any more."""
    remove_tree(_stand_in(run))


def hide(stand_in: Path) -> None:
    """Mount the directory over /etc, for this thread only.

    Raises:
        OSError: the kernel refused.
    """
    unshare_mounts()
    for source, target in mounts(stand_in):
        bind_mount(source, target)


def mounts(stand_in: Path) -> list[tuple[Path, Path]]:
    """Return the pairs of a directory and the place to mount it on, in order."""
    links = (stand_in / _LINKS).is_dir()
    first = [(_ETC / _LINKS, stand_in / _LINKS)] if links else []
    return [*first, (stand_in, _ETC)]


def can_hide() -> bool:
    """Whether this process may mount over /etc."""
    return os.geteuid() == 0 and _may_unshare()


@cache
def _may_unshare() -> bool:
    from concurrent.futures import ThreadPoolExecutor  # only the start of a VMM needs it

    with ThreadPoolExecutor(1) as one:
        try:
            one.submit(unshare_mounts).result()
        except OSError:
            return False
    return True


def _stand_in(run: Path) -> Path:
    return run / ".etc"


def _copy(name: str, stand_in: Path, flags: int) -> None:
    """Copy a file of /etc if it has changed, in place, because VMMs may have the copy open."""
    content = (_ETC / name).read_bytes()
    if name == _FILE:
        content = content[:_LARGEST]
    fd = os.open(stand_in / name, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(fd, 0o644)
        if os.pread(fd, len(content) + 1, 0) != content:
            os.pwrite(fd, content, 0)
            os.ftruncate(fd, len(content))
    finally:
        os.close(fd)
