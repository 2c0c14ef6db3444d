"""Checking the file systems of stored images, by their own checkers.

A right digest says that an image is as it was stored, not that it was a sound file system then. Not
here: digests (store/loading.py).
"""

from __future__ import annotations

from pathlib import Path

from onecopy.errors import CommandFailed, StoreDamaged
from onecopy.images.range_record import MEDIA_TYPE
from onecopy.store import Artifact, Layer
from onecopy.vmm.confined_tool import run_on_file
from onecopy.vmm.passed_files import READ

#: File system -> a command that writes nothing and fails if anything is wrong.
_CHECKERS = {
    "erofs": ("fsck.erofs",),
    "ext2": ("e2fsck", "-f", "-n"),
    "ext4": ("e2fsck", "-f", "-n"),
}

#: Of what a checker says.
_LINES = 12


def check_images(artifact: Artifact) -> list[str]:
    """Check every image of ``artifact`` that has a known file system; return which these have.

    Raises StoreDamaged with what the checker said, MissingProgram.
    """
    found = []
    for layer in artifact.layers:
        fs = file_system(layer)
        if fs in _CHECKERS:
            _check(artifact, layer.path, fs)
            found.append(fs)
    return found


def file_system(layer: Layer) -> str:
    """What the media type of a layer says; "" if it is no image."""
    kind, _, form = layer.media_type.partition("+")
    return form if kind == MEDIA_TYPE else ""


def _check(artifact: Artifact, path: Path, fs: str) -> None:
    wrong = _complaint(fs, path)
    if wrong:
        raise StoreDamaged(
            f"the {fs} of {artifact.ref} in {path} is damaged: {_beginning(wrong)}",
            hint=f"its digest is right, so it was stored like this: `onecopy rm {artifact.ref}`, "
            "then build or save it again",
        )


def _complaint(fs: str, path: Path) -> str:
    """What the checker says is wrong; "" if nothing is.

    It reads what a guest, or somebody else's registry, may have written: it is confined.
    """
    try:
        with path.open("rb") as file:
            ran = run_on_file(_CHECKERS[fs], file.fileno(), rights=READ)
    except CommandFailed as error:
        return error.message if error.limit else error.output or error.message
    output = f"{ran.err}\n{ran.out}"
    # fsck.erofs 1.5 says that the superblock is wrong, and exits with 0 (fsck/main.c).
    return output if "<E>" in output else ""


def _beginning(output: str) -> str:
    """What was wrong first; the rest mostly follows from it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "\n".join(lines[:_LINES] + ["..."] * (len(lines) > _LINES))
