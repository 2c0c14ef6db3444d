"""The source ``dir:PATH``: a directory, imaged in place.

Not here: reading the directory (images/tree.py, images/fs_image.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import BadSource
from onecopy.images.source_errors import opening

# Kernel file systems without stored files.
_PSEUDO = (Path("/proc"), Path("/sys"))
_REFUSED = (Path("/"), Path("/dev"), Path("/run"))


class DirectorySource(msgspec.Struct, frozen=True):
    """The tree below ``path``, unchanged."""

    path: Path
    label: str = "dir"
    left_out: list[str] = []

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:  # noqa: ARG002
        """Return the directory itself.

        Raises:
            BadSource: The directory is empty or cannot be read.
        """
        try:
            if not any(self.path.iterdir()):
                raise BadSource(f"{self.path} is empty", hint="give a directory with files")
        except OSError as error:
            raise BadSource(
                f"cannot read {self.path}: {error.strerror}",
                hint="give a directory that you may read, or run as root",
            ) from error
        return self.path


def open_directory(text: str) -> DirectorySource:
    """Return the source for the directory ``text``.

    Raises:
        BadSource: It is not a directory, or belongs to the running host's system.
    """
    with opening("directory", text, "write dir:PATH with the path of a directory"):
        path = Path(text).resolve(strict=True)
        is_directory = path.is_dir()
    if not is_directory:
        raise BadSource(f"{text!r} is not a directory", hint="for an archive write tar:PATH")
    if path in _REFUSED or any(path.is_relative_to(pseudo) for pseudo in _PSEUDO):
        raise BadSource(
            f"{path} belongs to the running host's system",
            hint="copy the files that you need to another directory",
        )
    return DirectorySource(path)
