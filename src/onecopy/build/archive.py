"""The source ``tar:PATH``: a tar archive, plain or compressed (.gz .bz2 .xz .zst).

GNU tar lists it, so that the checks see what is going to be unpacked, and unpacks it; on its own
it already holds back links that lead out until all members are written.
Not here: OCI images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.build.opening import opening
from onecopy.build.space import disk_is_full, disk_space
from onecopy.build.tree import clamp_times, clock
from onecopy.errors import BadSource, CommandFailed
from onecopy.model import PAGE_SIZE, align_up
from onecopy.run import find_program, run

#: What makes tar keep all that a tree holds.
TAR_OPTIONS = ("--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner")

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A line of `tar -tv --quoting-style=c`: mode, owner, size, date, time, "name"[ link to "target"].
_LINE = re.compile(
    r'(?P<type>.)\S+ +\S+ +(?P<size>\S+) +\S+ +\S+ +"(?P<name>(?:[^"\\]|\\.)*)"'
    r'(?: link to "(?P<target>(?:[^"\\]|\\.)*)")?'
)
_HINT = "make it again with GNU tar from inside the folder: tar -C FOLDER -cf FILE ."


class ArchiveSource(msgspec.Struct, frozen=True):
    """The members of the archive ``path``."""

    path: Path
    label: str = "tar"

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Unpack into the empty folder ``into``, as root, and return it.

        Raises BadSource (not an archive, broken, or with members that lead out), NotEnough,
        MissingProgram, OSError.
        """
        progress(f"checking {self.path.name}")
        size = self._check()
        progress(f"unpacking {self.path.name}")
        start = clock(into)
        into.chmod(0o755)
        with disk_space(into, size):
            try:
                extract = self._tar("--extract", "-C", str(into), "-p", "--same-owner")
                require_kept(run(["sh", "-c", 'exec "$@" 2>&1', "sh", *extract]))
            except CommandFailed as error:
                if disk_is_full(error):
                    raise
                raise self._broken(error) from error
            # Folders that are no members of their own were made now.
            clamp_times(into, start)
        return into

    def _check(self) -> int:
        """Bytes that the members take; raise BadSource before anything is written."""
        try:
            lines = run(self._tar("--list", "-v", "-P", "--quoting-style=c")).splitlines()
        except CommandFailed as error:
            raise self._broken(error) from error
        if not lines:
            raise BadSource(f"{self.path} holds nothing", hint=_HINT)
        return sum(self._check_line(line) for line in lines)

    def _check_line(self, line: str) -> int:
        match = _LINE.match(line)
        if not match:
            raise BadSource(f"{self.path}: cannot make sense of the member {line}", hint=_HINT)
        for name in (match["name"], match["target"] or ""):
            if name.startswith("/") or ".." in name.split("/"):
                raise BadSource(
                    f"{self.path}: the member {match['name']!r} leads out of the archive",
                    hint=_HINT,
                )
        return align_up(int(match["size"]), PAGE_SIZE) if match["type"] == "-" else PAGE_SIZE

    def _tar(self, action: str, *options: str) -> list[str]:
        # A colon in the name would mean another host without --force-local.
        return ["tar", action, "--force-local", f"--file={self.path}", *TAR_OPTIONS, *options]

    def _broken(self, error: CommandFailed) -> BadSource:
        said = "\n".join(error.output.strip().splitlines()[-8:])
        return BadSource(f"{self.path} cannot be unpacked:\n{said}", hint=_HINT)


def require_kept(said: str) -> None:
    """Raise BadSource if tar ``said`` that it lost attributes or ACLs: it only warns of that."""
    lost = [line for line in said.splitlines() if "Cannot set " in line]
    if lost:
        raise BadSource(
            "attributes would be lost:\n" + "\n".join(lost[:8]),
            hint="remove them, or use a file system that can hold them (--fs erofs)",
        )


def open_archive(text: str) -> ArchiveSource:
    """The archive ``text``; raise BadSource, or MissingProgram if its compression needs one."""
    with opening("archive", text, "write tar:PATH with the path of a tar archive"):
        path = Path(text).resolve(strict=True)
        if not path.is_file():
            raise BadSource(f"{text!r} is not a file", hint="a folder is dir:PATH")
        with path.open("rb") as file:
            start = file.read(6)
    for magic, program in _MAGIC.items():
        if start.startswith(magic):
            find_program(program)
    return ArchiveSource(path)
