"""Disks of guests: what they write there stays when they end.

A guest's own disk is a sparse raw image with an ext4, ``ROOT/disks/GUEST.img`` in the store's
folder, found again by the guest's name. Any other file is its user's. Whoever uses one has it
locked (linux/disk_image.py). Not here: how it comes into the guest (resources.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import InUse, InvalidInput, NotFound, NotPermitted
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.free_space import disk_space
from onecopy.linux import disk_image
from onecopy.model import MIB, align_up, check_guest_name, format_size, in_order, parse_size
from onecopy.store.disk import file_errors, sync_folder
from onecopy.subprocesses import find_program, run
from onecopy.vmm.confined_tool import run_on_file

_SUFFIX = ".img"
#: Below this there is no room for a journal.
_MINIMUM = 16 * MIB


class DiskSpec(msgspec.Struct, frozen=True):
    """A disk that a user asks for: the guest's own, of ``size`` bytes, or ``file``."""

    size: int = 0
    file: Path | None = None
    mountpoint: str = ""
    """"" leaves it as a device."""

    @classmethod
    def parse(cls, text: str) -> DiskSpec:
        """``SIZE`` or ``FILE``, and ``:/MOUNTPOINT`` if it is to be mounted."""
        what, colon, mountpoint = text.rpartition(":/")
        where = f"/{mountpoint.rstrip('/')}" if colon else ""
        what = what if colon else text
        try:
            return cls(size=align_up(parse_size(what), MIB), mountpoint=where)
        except InvalidInput:
            return cls(file=Path(what), mountpoint=where)


class OpenDisk(msgspec.Struct, frozen=True):
    """A disk, open and locked."""

    spec: DiskSpec
    path: Path
    fd: int
    form: str
    """``raw`` or ``qcow2``."""
    made: bool = False
    """Whether it was made just now."""


class OwnDisk(msgspec.Struct, frozen=True):
    """A guest's own disk, as it lies in the store's folder."""

    name: str
    size: int
    """Bytes."""
    allocated: int
    """Bytes that it takes."""
    guest: str
    """The guest that uses it; "" if none does."""


def check_disks(specs: Sequence[DiskSpec], *, named: bool, count: int) -> None:
    """Raise InvalidInput for disks that guests cannot have together, before any is started.

    ``named``: the user named the guests; ``count`` is how many there are.
    """
    own = [spec for spec in specs if spec.file is None]
    if len(own) > 1:
        raise InvalidInput("a guest has one disk of its own", hint="give files for the others")
    if own and not named:
        raise InvalidInput(
            "a disk is found again by its guest's name, and the guest has none", hint="give --name"
        )
    if own and own[0].size < _MINIMUM:
        raise InvalidInput(
            f"a disk of {format_size(own[0].size)} is too small",
            hint=f"give at least {_MINIMUM // MIB}M",
        )
    if count > 1 and len(own) < len(specs):
        raise InvalidInput(
            "several guests cannot have one file as their disk",
            hint="give a size: each gets a disk of its own",
        )


@contextlib.contextmanager
def opened(host: Runtime, guest: str, spec: DiskSpec) -> Iterator[OpenDisk]:
    """A disk for a guest, open and locked; its own is made, or made larger, if need be.

    At an error what was made for it is removed. Raises InUse, InvalidInput, NotFound, NotPermitted,
    InsufficientResources (disk), CommandFailed, MissingProgram.
    """
    with contextlib.ExitStack() as ends:
        if spec.file is not None:
            fd = ends.enter_context(_open(host, spec.file))
            _require_usable(host, spec.file, fd)
            yield OpenDisk(spec, spec.file.resolve(), fd, disk_image.form_of(fd, spec.file.name))
            return
        path = _path(host, guest)
        new = not path.exists()
        if new:
            _make(host, path, spec.size)
        fd = ends.enter_context(_open(host, path))
        try:
            _enlarge(path, fd, spec.size)
            yield OpenDisk(spec, path, fd, "raw", made=new)
        except BaseException:
            if new:
                path.unlink()
            raise


def check_usable(host: Runtime, guest: str, specs: Sequence[DiskSpec]) -> None:
    """Raise as `opened` does for disks of one guest, and make, lock and change nothing."""
    seen: list[tuple[int, int]] = []
    for spec in specs:
        path = spec.file or _path(host, guest)
        if spec.file is None and not path.exists():
            find_program("mke2fs")
            continue
        with _open(host, path, lock=False) as fd:
            status = os.fstat(fd)
            if disk_image.is_used(fd) or (status.st_dev, status.st_ino) in seen:
                raise _in_use(host, path)
            seen.append((status.st_dev, status.st_ino))
            if spec.file is None:
                _require_larger(path, fd, spec.size)
            else:
                _require_usable(host, path, fd)
                disk_image.form_of(fd, path.name)


@contextlib.contextmanager
def _open(host: Runtime, path: Path, *, lock: bool = True) -> Iterator[int]:
    """Open and lock an image; raise NotFound, NotPermitted, InUse."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no disk {path}", hint="check the path") from error
    except IsADirectoryError as error:
        raise InvalidInput(f"{path} is a folder", hint="give a disk image") from error
    except OSError as error:
        raise NotPermitted(
            f"{path} cannot be written to: {error.strerror}", hint="give one that you may write to"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"{path} is no file", hint="give a disk image, qcow2 or raw")
        if lock and not disk_image.lock(fd):
            raise _in_use(host, path)
        if not os.fstat(fd).st_nlink:
            raise NotFound(f"the disk {path} has just been removed", hint="try again")
        yield fd
    finally:
        os.close(fd)


def _in_use(host: Runtime, path: Path) -> InUse:
    guest = _user(host, path)
    return InUse(
        f"the disk {path} is in use by {guest or 'another program'}",
        users=[guest] if guest else [],
        hint=f"`onecopy stop {guest}` first" if guest else "fuser(1) tells which, and end that",
    )


def _user(host: Runtime, path: Path) -> str:
    """The guest that has a file as its disk; "" if none on record has."""
    for record in host.guests():
        for disk in record.disks:
            with contextlib.suppress(OSError):
                if path.samefile(disk.path):
                    return record.name
    return ""


def _require_usable(host: Runtime, path: Path, fd: int) -> None:
    if path.resolve().is_relative_to(host.store.root.resolve()):
        raise InvalidInput(
            f"{path} is part of the store", hint="a guest's own disk comes with a size, and --name"
        )
    if not os.fstat(fd).st_size:
        raise InvalidInput(f"{path} is empty", hint="truncate(1) gives it a size")


def _path(host: Runtime, guest: str) -> Path:
    return host.store.root / "disks" / f"{check_guest_name(guest)}{_SUFFIX}"


def _make(host: Runtime, path: Path, size: int) -> None:
    """A new disk, there as a whole or not at all."""
    with file_errors(host.store.root), host.store.workspace() as work:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        new = work / "disk"
        with new.open("xb") as file:
            new.chmod(0o600)
            _set_size(file.fileno(), size)
            with disk_space(work, 0):
                run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-e", "remount-ro", new])
            os.fsync(file.fileno())
        new.rename(path)
        sync_folder(path.parent)


def _set_size(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise InvalidInput(
            f"a file of the host cannot have {format_size(size)}", hint="give a smaller size"
        ) from error


def _enlarge(path: Path, fd: int, size: int) -> None:
    """Give a disk, and the file system that it was made with, ``size`` bytes."""
    present = _require_larger(path, fd, size)
    if size > present:
        _set_size(fd, size)
    # Not by the length of the file: an earlier command may have been killed after that.
    inside = disk_image.file_system_size(fd)
    if inside is not None and size - inside >= MIB:
        # Replays the journal, and repairs what can be without asking: exit code 1 (e2fsck(8)).
        run_on_file(["e2fsck", "-f", "-p"], fd, fine=(0, 1))
        run_on_file(["resize2fs"], fd)


def _require_larger(path: Path, fd: int, size: int) -> int:
    """How large a disk is; raise InvalidInput if it is to be made smaller."""
    present = os.fstat(fd).st_size
    if size < present:
        raise InvalidInput(
            f"the disk {path} has {format_size(present)} and is not made smaller",
            hint=f"give at least {-(-present // MIB)}M, or `onecopy disks --rm {path.stem}` it",
        )
    return present


def list_own_disks(host: Runtime) -> list[OwnDisk]:
    """All guests' own disks, by name."""
    found = []
    disks = (host.store.root / "disks").glob(f"*{_SUFFIX}")
    for path in sorted(disks, key=lambda path: in_order(path.stem)):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append(
                OwnDisk(path.stem, status.st_size, status.st_blocks * 512, _user(host, path))
            )
    return found


def remove_made(host: Runtime, record: GuestRecord) -> None:
    """Remove the disk that was made for a guest whose start is undone; its VMM is gone."""
    if any(disk.created for disk in record.disks):
        remove(host, record.name)


def remove(host: Runtime, name: str) -> None:
    """Remove a guest's own disk; raise NotFound, InUse."""
    path = _path(host, name)
    if not path.exists():
        raise NotFound(f"there is no disk {name!r}", hint="`onecopy disks` lists them")
    with _open(host, path):
        path.unlink(missing_ok=True)
