"""The source ``tar:PATH``: a tar archive, plain or compressed (.gz .bz2 .xz .zst).

The archive is read once, from start to end, and unpacked on the fly. The decompressor is an
external program and runs confined. Not here: the format (images/tar_format.py), unpacking
(images/unpack.py), OCI images.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from onecopy.errors import BadSource, CommandFailed
from onecopy.images.decompressors import decompressor
from onecopy.images.free_space import disk_space
from onecopy.images.pax_header import BadMember
from onecopy.images.skipped import SkippedItems
from onecopy.images.source_errors import opening
from onecopy.images.tar_format import Stream, TarReader
from onecopy.images.unpack import unpack
from onecopy.linux.removal import remove_tree
from onecopy.subprocesses import find_program
from onecopy.vmm.confined_tool import Limits, Task, Tool, running

_HINT = "pack it again with GNU tar: tar -C DIRECTORY -cf FILE ."
#: Time limit of decompression in seconds: a constant, and more for each MiB of the archive.
_SECONDS, _SECONDS_PER_MIB = 6 * 3600, 10
_BUFFER = 1 << 20


class ArchiveSource(msgspec.Struct, frozen=True):
    """The members of the archive ``path``."""

    path: Path
    label: str = "tar"
    left_out: list[str] = []

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Unpack into the empty directory ``into``, and leave it empty on failure; only root can.

        Returns:
            ``into``.

        Raises:
            BadSource: The file is not an archive, is damaged, or has a member that points outside
                or cannot be stored.
            InsufficientResources, MissingProgram, Incompatible, OSError: As their names say.
        """
        progress(f"unpacking {self.path.name}")
        left_out = SkippedItems()
        try:
            with disk_space(into, 0):
                self._unpack(into, left_out)
        except BaseException:
            remove_tree(into)
            into.mkdir(exist_ok=True)
            raise
        self.left_out.extend(left_out.lines())
        return into

    def _unpack(self, into: Path, left_out: SkippedItems) -> None:
        try:
            with opening("archive", str(self.path), _HINT):
                file = self.path.open("rb", buffering=0)
            with file, _decompressed(file) as (stream, tool):
                try:
                    count = unpack(TarReader(stream, left_out.add), into)
                except BadMember:
                    # The decompressor knows the reason if the archive ends too early.
                    _finish(stream, tool)
                    raise
                _finish(stream, tool)
        except BadMember as error:
            where = f"member {os.fsdecode(error.name[:4096])!r}: " if error.name else ""
            raise self._broken(f"{where}{error.what}") from error
        except CommandFailed as error:
            last = "\n".join(error.output.strip().splitlines()[-8:])
            raise self._broken(error.message if error.limit else last) from error
        if not count:
            raise BadSource(f"the archive {self.path} is empty", hint=_HINT)

    def _broken(self, what: str) -> BadSource:
        return BadSource(f"cannot unpack {self.path}: {what}", hint=_HINT)


@contextmanager
def _decompressed(file: io.FileIO) -> Iterator[tuple[Stream, Tool | None]]:
    """Yield the archive's uncompressed stream, and its decompressor if there is one."""
    start = file.read(6)
    file.seek(0)
    program = decompressor(start)
    if not program:
        yield io.BufferedReader(file, _BUFFER), None
        return
    seconds = _SECONDS + _SECONDS_PER_MIB * (os.fstat(file.fileno()).st_size >> 20)
    read, write = os.pipe2(os.O_CLOEXEC)
    with io.FileIO(read, "rb") as ours:
        try:
            # zstd is multi-threaded, and the kernel counts threads as processes.
            limits = Limits(seconds=seconds, processes=16)
            task = Task([program, "-dc"], stdin=file.fileno(), stdout=write, limits=limits)
            tool = running(task)
            begun = tool.__enter__()
        finally:
            os.close(write)
        try:
            yield io.BufferedReader(ours, _BUFFER), begun
        finally:
            tool.__exit__(None, None, None)


def _finish(stream: Stream, tool: Tool | None) -> None:
    """Raise CommandFailed if the decompressor failed or printed a warning."""
    if tool and not stream.read(1):
        ran = tool.finish()
        if ran.err.strip():
            raise CommandFailed("decompressing the archive", ran.code, ran.err)


def open_archive(text: str) -> ArchiveSource:
    """Return the source for the archive ``text``.

    Raises:
        BadSource: The archive cannot be opened.
        MissingProgram: Its decompressor is not installed.
    """
    with opening("archive", text, "write tar:PATH with the path of a tar archive"):
        path = Path(text).resolve(strict=True)
        # Opening a pipe would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadSource(
                f"{text!r} is not a regular file", hint="for a directory write dir:PATH"
            )
        with path.open("rb") as file:
            program = decompressor(file.read(6))
    if program:
        find_program(program)
    return ArchiveSource(path)
