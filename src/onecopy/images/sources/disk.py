"""The source ``disk:FILE[#PARTITION]``: the files of a machine, from an image of its disk.

The host's kernel mounts nothing of it: a reader does, a guest of our own (images/disk_reader.py),
which sees the image through an overlay, so that a journal is replayed and the image stays as it is.
What the machine's fstab mounts of the same disk is put in its place. Not here: the image's format
(images/disk_format.py), its partitions (images/partitions.py), fstab's lines (images/fstab.py), the
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
    """The files of one partition of the disk image ``path``, and of what is mounted there."""

    path: Path
    partition: int | None
    """None: the one that holds a root."""
    store: Store
    """Where the reader's kernel comes from."""
    label: str = "disk"
    left_out: list[str] = []
    """What of the disk was not unpacked."""

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Copy the files into the empty folder ``into``, as root, and return it.

        Raises BadSource (no disk image, in use, truncated, damaged, encrypted, LVM; no root, or
        several), InsufficientResources, MissingProgram, Incompatible, OSError.
        """
        try:
            with self._opened() as fd:
                before = os.fstat(fd)
                self._read(fd, into, progress)
                _require_unchanged(before, os.fstat(fd))
        except BadSource as error:
            message = f"{self.path} cannot be a source: {error.message}"
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
            progress(f"looking into {self.path.name}")
            guest = ends.enter_context(reader(parts, Disk(fd, form.driver, overlay)))
            tree = DiskTree(guest, self.partition)
            progress(f"copying {tree.name}")
            tree.copy(into)
            self.left_out.extend(tree.left_out())

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The image, open and kept from being written to by whoever heeds QEMU's locks."""
        with opening("disk image", str(self.path), "give a disk image that can be read"):
            fd = os.open(self.path, _FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadSource("it is no file", hint="copy a device to a file first")
            if not lock_for_reading(fd):
                raise BadSource("a running machine writes to it", hint="end that, or copy the disk")
            yield fd
        finally:
            os.close(fd)


@contextmanager
def _overlay(path: Path, form: DiskFormat) -> Iterator[int]:
    """An empty image of the same size, for what is written to the disk: a replayed journal."""
    run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(form.size)])
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    # It needs no name any more.
    path.unlink()
    try:
        yield fd
    finally:
        os.close(fd)


def _require_unchanged(before: os.stat_result, after: os.stat_result) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadSource("it changed while it was read", hint="build again when nobody writes to it")


def open_disk(text: str, store: Store) -> DiskSource:
    """The disk image ``text``, FILE or FILE#PARTITION; raise BadSource or MissingProgram."""
    match = re.fullmatch(r"(.+)#([0-9]{1,4})", text)
    name, partition = (match[1], int(match[2])) if match else (text, None)
    hint = "write disk:FILE or disk:FILE#PARTITION with the path of a disk image"
    with opening("disk image", name, hint):
        path = Path(name).resolve(strict=True)
        fd = os.open(path, _FLAGS)
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        os.close(fd)
    if not is_file:
        raise BadSource(f"{name!r} is not a file", hint="copy a device to a file first")
    for program in ("qemu-img", "blkid", "partx", "tar"):
        find_program(program)
    return DiskSource(path, partition, store)
