"""Guests' disks, whose content stays when the guest ends.

A guest's own disk is a sparse raw image with an ext4 file system: ``ROOT/disks/GUEST.img``, where
ROOT is the store's directory. A later guest of the same name gets the same disk. Any other file
belongs to the user. A disk in use is locked (linux/disk_image.py). Not here: plugging a disk into
a guest (resources.py).
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
from onecopy.linux import disk_image
from onecopy.model import MIB, align_up, check_guest_name, format_size, in_order, parse_size
from onecopy.store.disk import file_errors, sync_directory
from onecopy.subprocesses import find_program, run

_SUFFIX = ".img"
#: Bytes below which a disk has no room for a journal.
_MINIMUM = 16 * MIB


class DiskSpec(msgspec.Struct, frozen=True):
    """A requested disk: the guest's own, of ``size`` bytes, or the image ``file``."""

    size: int = 0
    file: Path | None = None
    mountpoint: str = ""
    """The mount point in the guest; "" leaves the disk unmounted."""

    @classmethod
    def parse(cls, text: str) -> DiskSpec:
        """Parse ``SIZE`` or ``FILE``, with ``:/MOUNTPOINT`` for a disk to mount."""
        what, colon, mountpoint = text.rpartition(":/")
        where = f"/{mountpoint.rstrip('/')}" if colon else ""
        what = what if colon else text
        try:
            return cls(size=align_up(parse_size(what), MIB), mountpoint=where)
        except InvalidInput:
            return cls(file=Path(what), mountpoint=where)


class OpenDisk(msgspec.Struct, frozen=True):
    """An open and locked disk."""

    spec: DiskSpec
    path: Path
    fd: int
    form: str
    """``raw`` or ``qcow2``."""
    made: bool = False
    """Whether this start made the disk."""


class OwnDisk(msgspec.Struct, frozen=True):
    """A guest's own disk in the store's directory."""

    name: str
    size: int
    """Bytes that the guest sees."""
    allocated: int
    """Bytes that the image takes on the host's disk."""
    guest: str
    """The guest that uses the disk; "" if none does."""


def check_disks(specs: Sequence[DiskSpec], *, named: bool, count: int) -> None:
    """Check before a start that guests can have these disks together.

    Args:
        specs: The disks of each guest.
        named: Whether the user named the guests.
        count: The number of guests.

    Raises:
        InvalidInput: The guests cannot have these disks.
    """
    own = [spec for spec in specs if spec.file is None]
    if len(own) > 1:
        raise InvalidInput(
            "a guest can have only one disk of its own", hint="give image files for the others"
        )
    if own and not named:
        raise InvalidInput(
            "a disk of the guest's own needs a guest with a name", hint="give --name"
        )
    if own and own[0].size < _MINIMUM:
        raise InvalidInput(
            f"a disk of {format_size(own[0].size)} is too small",
            hint=f"give at least {_MINIMUM // MIB}M",
        )
    if count > 1 and len(own) < len(specs):
        raise InvalidInput(
            "several guests cannot share one disk image",
            hint="give a size instead of a file: each guest gets a disk of its own",
        )


@contextlib.contextmanager
def opened(host: Runtime, guest: str, spec: DiskSpec) -> Iterator[OpenDisk]:
    """Yield a guest's disk, open and locked; make or enlarge the guest's own disk if needed.

    After an error a new disk is removed.

    Raises:
        NotFound, NotPermitted, InUse, InvalidInput: The disk cannot be used.
        InsufficientResources: The host's disk has too little free space.
        CommandFailed, MissingProgram: A tool for file systems failed or is not installed.
    """
    with contextlib.ExitStack() as ends:
        if spec.file is not None:
            fd = ends.enter_context(_open(host, spec.file))
            _require_usable(host, spec.file, fd)
            yield OpenDisk(spec, spec.file.resolve(), fd, disk_image.format_of(fd, spec.file.name))
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
    """Raise the errors of `opened` for one guest's disks, but make, lock and change nothing."""
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
                disk_image.format_of(fd, path.name)


@contextlib.contextmanager
def _open(host: Runtime, path: Path, *, lock: bool = True) -> Iterator[int]:
    """Open and lock an image; raise NotFound, NotPermitted, InUse."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no disk {path}", hint="check the path") from error
    except IsADirectoryError as error:
        raise InvalidInput(f"{path} is a directory", hint="give a disk image") from error
    except OSError as error:
        raise NotPermitted(
            f"cannot write to {path}: {error.strerror}", hint="give a file that you may write to"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(
                f"{path} is not a regular file", hint="give a disk image, qcow2 or raw"
            )
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
        hint=f"stop the guest first: `onecopy stop {guest}`"
        if guest
        else "find it with fuser(1), and end it",
    )


def _user(host: Runtime, path: Path) -> str:
    """Return the running guest that has the file as a disk; "" if none has."""
    for record in host.guests():
        for disk in record.disks:
            with contextlib.suppress(OSError):
                if path.samefile(disk.path):
                    return record.name
    return ""


def _require_usable(host: Runtime, path: Path, fd: int) -> None:
    if path.resolve().is_relative_to(host.store.root.resolve()):
        raise InvalidInput(
            f"{path} is part of the store",
            hint="give --disk SIZE and --name for a guest's own disk",
        )
    if not os.fstat(fd).st_size:
        raise InvalidInput(f"{path} is empty", hint="give it a size with truncate(1)")


def _path(host: Runtime, guest: str) -> Path:
    return host.store.root / "disks" / f"{check_guest_name(guest)}{_SUFFIX}"


def _make(host: Runtime, path: Path, size: int) -> None:
    """Make a disk; after a failure or a crash no part of it remains."""
    from onecopy.images.free_space import disk_space  # most guests have no disk

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
        sync_directory(path.parent)


def _set_size(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        raise InvalidInput(
            f"the host's file system cannot hold a file of {format_size(size)}",
            hint="give a smaller size",
        ) from error


def _enlarge(path: Path, fd: int, size: int) -> None:
    """Enlarge a disk and its file system to ``size`` bytes."""
    present = _require_larger(path, fd, size)
    if size > present:
        _set_size(fd, size)
    # The length of the file is no proof: an earlier command may have been killed after setting it.
    inside = disk_image.file_system_size(fd)
    if inside is not None and size - inside >= MIB:
        from onecopy.vmm.confined_tool import run_on_file  # few starts enlarge a disk

        # e2fsck replays the journal and makes safe repairs; exit code 1 means repaired (e2fsck(8)).
        run_on_file(["e2fsck", "-f", "-p"], fd, fine=(0, 1))
        run_on_file(["resize2fs"], fd)


def _require_larger(path: Path, fd: int, size: int) -> int:
    """Return the size of a disk; raise InvalidInput if ``size`` is smaller."""
    present = os.fstat(fd).st_size
    if size < present:
        raise InvalidInput(
            f"the disk {path} has {format_size(present)} and cannot shrink",
            hint=f"give at least {-(-present // MIB)}M, or remove it with `onecopy disks --rm "
            f"{path.stem}`",
        )
    return present


def list_own_disks(host: Runtime) -> list[OwnDisk]:
    """Return all disks that guests own, by name."""
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
    """Remove the disk that a failed start made for its guest; the VMM must have ended."""
    if any(disk.created for disk in record.disks):
        remove(host, record.name)


def remove(host: Runtime, name: str) -> None:
    """Remove a guest's own disk; raise NotFound, InUse."""
    path = _path(host, name)
    if not path.exists():
        raise NotFound(f"there is no disk {name!r}", hint="list the disks with `onecopy disks`")
    with _open(host, path):
        path.unlink(missing_ok=True)
