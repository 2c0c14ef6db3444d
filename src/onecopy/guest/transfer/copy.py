"""Copies files and directories into a guest and out of it: `onecopy cp`.

A program in the guest (guest/exec.py) sends or receives a tar stream. Its tar is busybox's, so the
image needs none. No file is held in memory, and no copy gets its final name before it is complete.
Not here: the archive (tar.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from onecopy.errors import (
    AlreadyExists,
    GuestFailed,
    InsufficientResources,
    InvalidInput,
    NotFound,
    OnecopyError,
    TooLarge,
)
from onecopy.guest.exec import run_captured, run_streaming
from onecopy.guest.exec_streams import Kept, Streams, Tail
from onecopy.guest.transfer.destination import StrPath, finish, hidden, host_errors, place
from onecopy.guest.transfer.tar import Limits, Unpacker, Unusable, pack
from onecopy.images.initramfs import TOOLS_MOUNTPOINT
from onecopy.images.tree import walk
from onecopy.vmm.guest_reply import decimal

_BUSYBOX = f"{TOOLS_MOUNTPOINT}/bin/busybox"
_RUN = (_BUSYBOX, "sh", "-c")
#: Exit codes of the two scripts.
_MISSING, _NO_FOLDER, _TAKEN, _SPECIAL = 3, 4, 5, 6
#: The message of a program in the guest whose disk is full.
_FULL = "No space left on device"
#: Seconds for a guest to report free space, and to remove an incomplete copy after an error.
_PATIENCE, _TIDYING = 30.0, 1.0
#: The most bytes that a guest may print while it receives a copy.
_SAID = 1 << 16
_SHOW = "look at the file in the guest: `onecopy exec GUEST -- ls -l`"

#: SOURCE: writes its archive. A directory is archived from inside, without its own name.
_SEND = f"""
b={_BUSYBOX} source=$1
if [ -d "$source" ]; then
    cd "$source" && exec $b tar -cf - .
fi
[ -e "${{source%/}}" ] || exit {_MISSING}
case $source in */) exit {_NO_FOLDER} ;; esac
[ -f "$source" ] || exit {_SPECIAL}
cd "${{source%/*}}/" && exec $b tar -chf - "./${{source##*/}}"
"""
#: TARGET NAME d|f TAG: unpacks the archive on stdin to TARGET, or to NAME in the directory TARGET.
_RECEIVE = f"""
b={_BUSYBOX} target=$1
if [ -d "$target" ]; then
    target=${{target%/}}/$2
else
    case $target in */) exit {_NO_FOLDER} ;; esac
fi
parent=${{target%/*}}/
[ -e "$parent." ] || exit {_MISSING}
if [ -d "$target" ] || [ "$3" = d -a -e "$target" ]; then exit {_TAKEN}; fi
work=$parent.onecopy-$4
trap '$b rm -rf "$work"' EXIT
$b mkdir -m 700 "$work" && cd "$work" && $b tar -xf - || exit 1
case $3 in
    d) $b mv -T "$work" "$target" ;;
    f) $b mv -fT "$work/content" "$target" ;;
esac
"""


async def copy_in(folder: Path, source: StrPath, target: str) -> None:
    """Copy a file or directory of the host into a guest.

    As with cp(1), the copy goes into ``target`` if that is a directory, and otherwise gets that
    name. Links in a directory are copied as links. Root owns the copy. An existing file is
    replaced, an existing directory never. A failure leaves nothing in the guest.

    Args:
        folder: The guest's run directory.
        source: The path on the host.
        target: The path in the guest.

    Raises:
        NotFound, InvalidInput, AlreadyExists, NotPermitted: A path cannot be used.
        InsufficientResources: The guest has too little free space.
        AgentFailed, GuestFailed: The guest failed.
    """
    where, tag, err = _absolute(target), secrets.token_hex(8), Tail()
    with host_errors(source):
        real, name = _found(source)
        is_folder = real.is_dir()
        archive = _Packed(pack(real, "." if is_folder else "content"))
        argv = ["cp", where, name, "d" if is_folder else "f", tag]
        try:
            streams = Streams(Kept(_SAID), err, archive)
            code = await run_streaming(folder, [*_RUN, _RECEIVE, *argv], streams)
        except BaseException:
            await _tidy(folder, where, tag)
            raise
        if code:
            said = err.decode(errors="replace")
            full = await _full(folder, where, real) if _FULL in said else None
            raise full or _receiving(folder.name, code, where, said)


async def copy_out(
    folder: Path, source: str, target: StrPath, limits: Limits | None = None
) -> None:
    """Copy a file or directory out of a guest to the host.

    As with cp(1), the copy goes into ``target`` if that is a directory, and otherwise gets that
    name. This user owns the copy. Links must not lead out of the copied directory. An existing file
    is replaced, an existing directory never. The copy gets its name when it is complete. If this
    process is killed, the next copy to the same directory removes the rest.

    Args:
        folder: The guest's run directory.
        source: The path in the guest.
        target: The path on the host.
        limits: Limits of the archive.

    Raises:
        TooLarge: The archive exceeds a limit.
        NotFound, InvalidInput, AlreadyExists, NotPermitted: A path cannot be used.
        InsufficientResources: The host's disk has too little free space.
        AgentFailed, GuestFailed: The guest failed.
    """
    where, err = _absolute(source), Tail()
    with host_errors(target):
        final = place(target, posixpath.basename(where.rstrip("/")))
        with hidden(final.parent) as work:
            # A random name: no link that the guest sends can point to it.
            content = work / secrets.token_hex(16)
            unpacker = Unpacker(content, limits)
            streams = Streams(unpacker.feed, err)
            try:
                code = await run_streaming(folder, [*_RUN, _SEND, "cp", where], streams)
                if code:
                    raise _sending(folder.name, code, where, err.decode(errors="replace"))
                unpacker.finish()
            except Unusable as error:
                raise GuestFailed(
                    f"cannot copy {where} of {folder.name}: {error}",
                    hint="copy its files one by one, or run tar in the guest",
                ) from error
            except TooLarge as error:
                raise TooLarge(
                    f"cannot copy {where} of {folder.name}: {error.message}", hint=error.hint
                ) from error
            finish(content, final)


class _Packed(asyncio.StreamReader):
    """An archive that is generated as it is read, in larger chunks."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    async def read(self, n: int = -1) -> bytes:
        return await asyncio.to_thread(self._next, n)

    def _next(self, enough: int) -> bytes:
        data = bytearray()
        for piece in self._pieces:
            data += piece
            if len(data) >= enough:
                break
        return bytes(data)


def _absolute(path: str) -> str:
    """Return an absolute path in a guest; relative ones start at the root."""
    if not path or "\0" in path:
        raise InvalidInput("the path in the guest is empty", hint="write GUEST:PATH")
    return posixpath.join("/", path)


def _found(source: StrPath) -> tuple[Path, str]:
    """Return a source's resolved path and its name; raise OSError or InvalidInput."""
    path = os.fspath(source)
    # Without a trailing slash, which Python versions treat differently.
    real = Path(os.path.realpath(path.rstrip("/") or "/", strict=True))
    if path.endswith("/") and not real.is_dir():
        raise InvalidInput(f"{source} is not a directory", hint="omit the trailing /")
    name = Path(source).absolute().name
    if not name:
        raise InvalidInput("the host's root directory cannot be copied", hint="copy parts of it")
    return real, name


async def _tidy(folder: Path, where: str, tag: str) -> None:
    """Remove the incomplete copy of a killed program; ignore an ended guest."""
    script = f'{_BUSYBOX} rm -rf "${{1%/}}/.onecopy-$2" "${{1%/*}}/.onecopy-$2"'
    with contextlib.suppress(OnecopyError):
        await run_captured(folder, [*_RUN, script, "cp", where, tag], timeout=_TIDYING)


async def _full(folder: Path, where: str, source: Path) -> InsufficientResources:
    """Return the error for a guest without free space for ``source``."""
    script = f'{_BUSYBOX} df -Pk "$1" 2>/dev/null || {_BUSYBOX} df -Pk "${{1%/*}}/"'
    done = await run_captured(folder, [*_RUN, script, "cp", where], timeout=_PATIENCE)
    free = next(iter(done.stdout.split()[-3:]), b"")
    sizes = (s.st_size for _, s in walk(source) if not stat.S_ISLNK(s.st_mode))
    return InsufficientResources(
        f"disk in {folder.name}",
        needed=sum(sizes),
        available=decimal(free, f"what {folder.name} has left", most=1 << 50) << 10,
        hint="guests write to RAM: save the system with more --memory",
    )


def _sending(guest: str, code: int, where: str, said: str) -> OnecopyError:
    if code == _MISSING:
        return NotFound(f"there is no {where} in {guest}", hint="paths in guests start at /")
    if code == _NO_FOLDER:
        return InvalidInput(f"{where} is not a directory in {guest}", hint="omit the trailing /")
    if code == _SPECIAL:
        return InvalidInput(f"{where} of {guest} is neither a file nor a directory", hint=_SHOW)
    return GuestFailed(f"{guest} could not send {where}", output=said, hint=_SHOW)


def _receiving(guest: str, code: int, where: str, said: str) -> OnecopyError:
    if code == _MISSING:
        return NotFound(
            f"there is no directory {posixpath.dirname(where)} in {guest}",
            hint=f"make it first: `onecopy exec {guest} -- mkdir -p DIRECTORY`",
        )
    if code == _NO_FOLDER:
        return InvalidInput(f"{where} is not a directory in {guest}", hint="omit the trailing /")
    if code == _TAKEN:
        return AlreadyExists(
            f"{where} already exists in {guest}",
            hint=f"remove it first: `onecopy exec {guest} -- rm -r PATH`",
        )
    return GuestFailed(f"{guest} could not write {where}", output=said, hint=_SHOW)
