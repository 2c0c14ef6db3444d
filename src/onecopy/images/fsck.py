"""Checks the file systems of stored images with fsck.erofs and e2fsck.

A correct digest shows that an image is unchanged since it was stored. It does not show that the
file system was sound. Not here: digests (store/loading.py).
"""

from __future__ import annotations

from pathlib import Path

from onecopy.errors import CommandFailed, StoreDamaged
from onecopy.images.range_record import MEDIA_TYPE
from onecopy.store import Artifact, Layer
from onecopy.vmm.confined_tool import run_on_file
from onecopy.vmm.passed_files import READ

#: File system -> a command that writes nothing and fails on any error.
_CHECKERS = {
    "erofs": ("fsck.erofs",),
    "ext2": ("e2fsck", "-f", "-n"),
    "ext4": ("e2fsck", "-f", "-n"),
}

#: Lines of a checker's output that an error quotes.
_LINES = 12


def check_images(artifact: Artifact) -> list[str]:
    """Check each image of ``artifact`` that has a known file system.

    Returns:
        The file systems checked, one for each image.

    Raises:
        StoreDamaged: A checker found an error; the message quotes its output.
        MissingProgram: A checker is not installed.
    """
    found = []
    for layer in artifact.layers:
        fs = file_system(layer)
        if fs in _CHECKERS:
            _check(artifact, layer.path, fs)
            found.append(fs)
    return found


def file_system(layer: Layer) -> str:
    """Return the file system in a layer's media type; "" if the layer is not an image."""
    kind, _, form = layer.media_type.partition("+")
    return form if kind == MEDIA_TYPE else ""


def _check(artifact: Artifact, path: Path, fs: str) -> None:
    wrong = _complaint(fs, path)
    if wrong:
        raise StoreDamaged(
            f"the {fs} file system of {artifact.ref} in {path} is damaged: {_first_lines(wrong)}",
            hint="the digest is correct, so the image was damaged when it was stored: "
            f"run `onecopy rm {artifact.ref}`, then build or save it again",
        )


def _complaint(fs: str, path: Path) -> str:
    """Return the checker's error output; "" if the file system is sound.

    The checker runs confined, because a guest or another registry may have written the image.
    """
    try:
        with path.open("rb") as file:
            ran = run_on_file(_CHECKERS[fs], file.fileno(), rights=READ)
    except CommandFailed as error:
        return error.message if error.limit else error.output or error.message
    output = f"{ran.err}\n{ran.out}"
    # fsck.erofs 1.5 reports a damaged superblock but exits with 0 (fsck/main.c).
    return output if "<E>" in output else ""


def _first_lines(output: str) -> str:
    """Return the first errors; later ones mostly follow from them."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "\n".join(lines[:_LINES] + ["..."] * (len(lines) > _LINES))
