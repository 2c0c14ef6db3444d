"""Files and folders into a guest, and out of it: `onecopy cp`.

A stream of a program that runs in the guest (guest/exec.py): its tar is busybox's, so the image
needs none. Nothing is held in memory, and nothing has its final name before it is whole. Not here:
the archive (tar.py).
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
#: What programs in guests say then.
_FULL = "No space left on device"
#: Seconds that a guest gets to look, and to remove what is left when it is time for nothing else.
_PATIENCE, _TIDYING = 30.0, 1.0
#: Bytes that a guest may print while it takes a copy.
_SAID = 1 << 16
_SHOW = "`onecopy exec GUEST -- ls -l` shows what is there"

#: SOURCE -> its archive. A folder is archived from inside, so that its own name does not matter.
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
#: TARGET NAME d|f TAG: the archive on standard input becomes TARGET, or NAME in the folder TARGET.
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
    """Copy a file or folder of the host into the guest of a run folder, to ``target``.

    As cp(1) does: into ``target`` if that is a folder there, else under that name. Links in a
    folder are copied as they are; all belongs to root there. A file that is there is replaced, a
    folder never. Raises NotFound, InvalidInput, AlreadyExists, NotPermitted, InsufficientResources,
    AgentFailed, GuestFailed; what fails leaves nothing of it.
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
    """Copy a file or folder out of the guest of a run folder, to ``target`` of the host.

    As cp(1) does: into ``target`` if that is a folder, else under that name. What is made belongs
    to this user; links must not lead out of the folder that is copied. A file that is there is
    replaced, a folder never. Raises as `copy_in` does; also when this process is killed nothing
    has the name that is not whole, and the next copy to that folder removes what was begun.
    Raises TooLarge, too, beyond ``limits``.
    """
    where, err = _absolute(source), Tail()
    with host_errors(target):
        final = place(target, posixpath.basename(where.rstrip("/")))
        with hidden(final.parent) as work:
            # No link that a guest sends leads to a name that it cannot know.
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
                    f"{where} of {folder.name} cannot be copied: {error}",
                    hint="copy what is in it one by one, or run tar in the guest",
                ) from error
            except TooLarge as error:
                raise TooLarge(
                    f"{where} of {folder.name} cannot be copied: {error.message}", hint=error.hint
                ) from error
            finish(content, final)


class _Packed(asyncio.StreamReader):
    """An archive, read as it is made, in larger pieces."""

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
    """A path in a guest: relative ones begin at the root, as a program's do."""
    if not path or "\0" in path:
        raise InvalidInput("the path in the guest is empty", hint="write GUEST:PATH")
    return posixpath.join("/", path)


def _found(source: StrPath) -> tuple[Path, str]:
    """Where a source really lies, and its name; raise OSError or InvalidInput."""
    path = os.fspath(source)
    # Without a last /, about which Pythons differ.
    real = Path(os.path.realpath(path.rstrip("/") or "/", strict=True))
    if path.endswith("/") and not real.is_dir():
        raise InvalidInput(f"{source} is no folder", hint="leave the last / out")
    name = Path(source).absolute().name
    if not name:
        raise InvalidInput("the host's root cannot be copied", hint="copy folders of it")
    return real, name


async def _tidy(folder: Path, where: str, tag: str) -> None:
    """Remove what a program that was ended has begun; in vain if the guest is gone."""
    script = f'{_BUSYBOX} rm -rf "${{1%/}}/.onecopy-$2" "${{1%/*}}/.onecopy-$2"'
    with contextlib.suppress(OnecopyError):
        await run_captured(folder, [*_RUN, script, "cp", where, tag], timeout=_TIDYING)


async def _full(folder: Path, where: str, source: Path) -> InsufficientResources:
    """The guest has no room for ``source``: how much there would have to be."""
    script = f'{_BUSYBOX} df -Pk "$1" 2>/dev/null || {_BUSYBOX} df -Pk "${{1%/*}}/"'
    done = await run_captured(folder, [*_RUN, script, "cp", where], timeout=_PATIENCE)
    free = next(iter(done.stdout.split()[-3:]), b"")
    sizes = (s.st_size for _, s in walk(source) if not stat.S_ISLNK(s.st_mode))
    return InsufficientResources(
        f"disk in {folder.name}",
        needed=sum(sizes),
        available=decimal(free, f"what {folder.name} has left", most=1 << 50) << 10,
        hint="what guests write is in their memory: save the system with more --memory",
    )


def _sending(guest: str, code: int, where: str, said: str) -> OnecopyError:
    if code == _MISSING:
        return NotFound(f"there is no {where} in {guest}", hint="paths in guests begin at /")
    if code == _NO_FOLDER:
        return InvalidInput(f"{where} is no folder in {guest}", hint="leave the last / out")
    if code == _SPECIAL:
        return InvalidInput(f"{where} of {guest} is neither a file nor a folder", hint=_SHOW)
    return GuestFailed(f"{guest} could not send {where}", output=said, hint=_SHOW)


def _receiving(guest: str, code: int, where: str, said: str) -> OnecopyError:
    if code == _MISSING:
        return NotFound(
            f"there is no folder {posixpath.dirname(where)} in {guest}",
            hint=f"make it first: `onecopy exec {guest} -- mkdir -p FOLDER`",
        )
    if code == _NO_FOLDER:
        return InvalidInput(f"{where} is no folder in {guest}", hint="leave the last / out")
    if code == _TAKEN:
        return AlreadyExists(
            f"{where} is there already in {guest}",
            hint=f"remove it first: `onecopy exec {guest} -- rm -r PATH`",
        )
    return GuestFailed(f"{guest} could not make {where}", output=said, hint=_SHOW)
