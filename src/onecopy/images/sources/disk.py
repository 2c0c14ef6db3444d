"""The source ``disk:FILE[#PARTITION]``: the files of a machine, from an image of its disk.

The host's kernel never mounts the image. A reader guest does (images/disk_reader.py). It sees the
image through an overlay, so that it can replay a journal without changing the image. Other file
systems that the machine's fstab mounts from the same disk are included. Not here: the image's
format (images/disk_format.py), partitions (images/partitions.py), fstab (images/fstab.py),
unpacking (images/unpack.py).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from onecopy.errors import BadSource
from onecopy.images.disk_files import DiskTree
from onecopy.images.disk_format import DiskFormat, find_format
from onecopy.images.disk_reader import reader
from onecopy.images.reader_initramfs import reader_parts
from onecopy.images.source_errors import opening
from onecopy.linux.disk_image import lock_for_reading
from onecopy.store import Store
from onecopy.subprocesses import find_program, run
from onecopy.vmm.reader_vm import Disk

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class DiskSource(msgspec.Struct, frozen=True):
    """The files of a partition of the disk image ``path``, and of its mounts on the same disk."""

    path: Path
    partition: int | None
    """Number of the root's partition; None to search for it."""
    store: Store
    """Holds the reader's kernel."""
    label: str = "disk"
    left_out: list[str] = []

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Copy the files into the empty directory ``into``; only root can.

        Returns:
            ``into``.

        Raises:
            BadSource: The image is in use, damaged, encrypted or unsupported, or does not hold
                exactly one root.
            InsufficientResources, MissingProgram, Incompatible, OSError: As their names say.
        """
        try:
            with self._opened() as fd:
                before = os.fstat(fd)
                self._read(fd, into, progress)
                _require_unchanged(before, os.fstat(fd))
        except BadSource as error:
            message = f"{self.path} cannot be used as a source: {error.message}"
            raise BadSource(message, hint=error.hint) from error
        return into

    def _read(self, fd: int, into: Path, progress: Callable[[str], None]) -> None:
        form = find_format(fd)
        work = into.with_name("reader")
        work.mkdir()
        with ExitStack() as ends:
            ends.callback(work.rmdir)
            parts = reader_parts(self.store, work, progress)
            ends.callback(parts.initrd.unlink)
            overlay = ends.enter_context(_overlay(work / "overlay", form))
            progress(f"reading {self.path.name}")
            guest = ends.enter_context(reader(parts, Disk(fd, form.driver, overlay)))
            tree = DiskTree(guest, self.partition)
            progress(f"copying {tree.name}")
            tree.copy(into)
            self.left_out.extend(tree.left_out())

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Open the image, and hold QEMU's lock against writers."""
        with opening("disk image", str(self.path), "give a disk image that you may read"):
            fd = os.open(self.path, _FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadSource("it is not a regular file", hint="copy the device to a file first")
            if not lock_for_reading(fd):
                raise BadSource(
                    "a running machine has it open for writing",
                    hint="stop that machine, or build from a copy of the disk",
                )
            yield fd
        finally:
            os.close(fd)


@contextmanager
def _overlay(path: Path, form: DiskFormat) -> Iterator[int]:
    """Create an overlay of the same size; it takes the writes of a journal's replay."""
    run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(form.size)])
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    # The open descriptor is enough.
    path.unlink()
    try:
        yield fd
    finally:
        os.close(fd)


def _require_unchanged(before: os.stat_result, after: os.stat_result) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadSource(
            "it changed while it was read", hint="stop what writes to it, then build again"
        )


def open_disk(text: str, store: Store) -> DiskSource:
    """Return the source for the disk image ``text``, which is FILE or FILE#PARTITION.

    Raises:
        BadSource: The image cannot be opened.
        MissingProgram: A program that reading it needs is not installed.
    """
    match = re.fullmatch(r"(.+)#([0-9]{1,4})", text)
    name, partition = (match[1], int(match[2])) if match else (text, None)
    hint = "write disk:FILE or disk:FILE#PARTITION with the path of a disk image"
    with opening("disk image", name, hint):
        path = Path(name).resolve(strict=True)
        fd = os.open(path, _FLAGS)
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        os.close(fd)
    if not is_file:
        raise BadSource(f"{name!r} is not a regular file", hint="copy the device to a file first")
    for program in ("qemu-img", "blkid", "partx", "tar"):
        find_program(program)
    return DiskSource(path, partition, store)
