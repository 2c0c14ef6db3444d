"""The source ``tar:PATH``: a tar archive, plain or compressed (.gz .bz2 .xz .zst).

It is read once, from its beginning to its end, and unpacked as it comes. What decompresses it runs
confined and reaches nothing; what unpacks it is ours. Not here: the format (images/tar_format.py),
the unpacking (images/unpack.py), OCI images.
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
from onecopy.images.free_space import disk_space
from onecopy.images.pax_header import BadMember
from onecopy.images.skipped import LeftOut
from onecopy.images.source_errors import opening
from onecopy.images.tar_format import Stream, TarReader
from onecopy.images.unpack import unpack
from onecopy.linux.removal import remove_tree
from onecopy.subprocesses import find_program
from onecopy.vmm.confined_tool import Limits, Task, Tool, running

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_HINT = "make it again with GNU tar from inside the folder: tar -C FOLDER -cf FILE ."
#: Seconds that reading takes at most, and so many for each MiB of the archive.
_PATIENCE, _EACH = 6 * 3600, 10
_BUFFER = 1 << 20


class ArchiveSource(msgspec.Struct, frozen=True):
    """The members of the archive ``path``."""

    path: Path
    label: str = "tar"
    left_out: list[str] = []

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Unpack into the empty folder ``into``, as root, and return it; it is empty if that fails.

        Raises BadSource (not an archive, broken, or with members that lead out or cannot be kept),
        InsufficientResources, MissingProgram, Incompatible, OSError.
        """
        progress(f"unpacking {self.path.name}")
        left_out = LeftOut()
        try:
            with disk_space(into, 0):
                self._unpack(into, left_out)
        except BaseException:
            remove_tree(into)
            into.mkdir(exist_ok=True)
            raise
        self.left_out.extend(left_out.lines())
        return into

    def _unpack(self, into: Path, left_out: LeftOut) -> None:
        try:
            with opening("archive", str(self.path), _HINT):
                file = self.path.open("rb", buffering=0)
            with file, _decompressed(file) as (stream, tool):
                try:
                    count = unpack(TarReader(stream, left_out.add), into)
                except BadMember:
                    # Why the archive ends too early is what the decompressor says.
                    _finish(stream, tool)
                    raise
                _finish(stream, tool)
        except BadMember as error:
            where = f"the member {os.fsdecode(error.name[:4096])!r}: " if error.name else ""
            raise self._broken(f"{where}{error.what}") from error
        except CommandFailed as error:
            said = "\n".join(error.output.strip().splitlines()[-8:])
            raise self._broken(error.message if error.limit else said) from error
        if not count:
            raise BadSource(f"{self.path} holds nothing", hint=_HINT)

    def _broken(self, what: str) -> BadSource:
        return BadSource(f"{self.path} cannot be unpacked: {what}", hint=_HINT)


@contextmanager
def _decompressed(file: io.FileIO) -> Iterator[tuple[Stream, Tool | None]]:
    """What is in the file, and the program that decompresses it, if one does."""
    start = file.read(6)
    file.seek(0)
    program = _program(start)
    if not program:
        yield io.BufferedReader(file, _BUFFER), None
        return
    seconds = _PATIENCE + _EACH * (os.fstat(file.fileno()).st_size >> 20)
    read, write = os.pipe2(os.O_CLOEXEC)
    with io.FileIO(read, "rb") as ours:
        try:
            # zstd has threads.
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
    """Raise CommandFailed if the decompressor failed, or left something out."""
    if tool and not stream.read(1):
        ran = tool.finish()
        if ran.err.strip():
            raise CommandFailed("decompressing it", ran.code, ran.err)


def _program(start: bytes) -> str:
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")


def open_archive(text: str) -> ArchiveSource:
    """The archive ``text``; raise BadSource, or MissingProgram if its compression needs one."""
    with opening("archive", text, "write tar:PATH with the path of a tar archive"):
        path = Path(text).resolve(strict=True)
        # A pipe would be waited for.
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadSource(f"{text!r} is not a file", hint="a folder is dir:PATH")
        with path.open("rb") as file:
            program = _program(file.read(6))
    if program:
        find_program(program)
    return ArchiveSource(path)
