"""The source ``dir:PATH``: a folder, imaged where it is.

Not here: reading it (images/tree.py, images/fs_image.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import BadSource
from onecopy.images.source_errors import opening

# Their content is the kernel's, not anybody's files.
_PSEUDO = (Path("/proc"), Path("/sys"))
_REFUSED = (Path("/"), Path("/dev"), Path("/run"))


class FolderSource(msgspec.Struct, frozen=True):
    """The tree below ``path``, exactly as it is."""

    path: Path
    label: str = "dir"
    left_out: list[str] = []

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:  # noqa: ARG002
        """Return the folder itself; raise BadSource if it holds nothing or cannot be read."""
        try:
            if not any(self.path.iterdir()):
                raise BadSource(f"{self.path} is empty", hint="name a folder that holds files")
        except OSError as error:
            raise BadSource(
                f"cannot read {self.path}: {error.strerror}", hint="run as root if it is another's"
            ) from error
        return self.path


def open_folder(text: str) -> FolderSource:
    """The folder ``text``; raise BadSource if it is none, or is the host's own."""
    with opening("folder", text, "write dir:PATH with the path of a folder"):
        path = Path(text).resolve(strict=True)
        is_folder = path.is_dir()
    if not is_folder:
        raise BadSource(f"{text!r} is not a folder", hint="an archive is tar:PATH")
    if path in _REFUSED or any(path.is_relative_to(pseudo) for pseudo in _PSEUDO):
        raise BadSource(
            f"{path} is this running host's own", hint="copy what you need to another folder"
        )
    return FolderSource(path)
