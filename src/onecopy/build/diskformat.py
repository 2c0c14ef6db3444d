"""A disk image of one of QEMU's formats as a raw one.

Not here: what the disk holds (partitions.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from onecopy.build.space import disk_is_full, disk_space
from onecopy.errors import BadSource, CommandFailed
from onecopy.run import run

#: What to do about what cannot be read here.
OPEN_HINT = "open it on this host (cryptsetup, vgchange, mdadm), mount it, build from dir:PATH"
#: Why something may be unreadable.
DAMAGED = "the image may be truncated or damaged"
# Those that are one file.
_FORMATS = ("raw", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc")
_OTHER_FILES = re.compile(r'"(?:data-file|filename)": ("[^"]*")')


def as_raw(image: Path, scratch: Path, progress: Callable[[str], None]) -> Path:
    """``image`` itself if it is raw, else the new file ``scratch`` with the same content.

    Raises BadSource (damaged, encrypted, or needs other files), NotEnough, MissingProgram.
    """
    try:
        info = json.loads(run(["qemu-img", "info", "--output=json", image]))
        kind = str(info["format"])
        _require_one_file(image, kind, info)
        if kind == "raw":
            return image
        progress(f"converting {image.name} from {kind}")
        _check(image, kind)
        with disk_space(scratch.parent, int(info["actual-size"])):
            run(["qemu-img", "convert", "-f", kind, "-O", "raw", image, scratch])
    except CommandFailed as error:
        if disk_is_full(error):
            raise
        raise BadSource(said(error), hint=f"{DAMAGED}; `qemu-img check` tells more") from error
    return scratch


def _check(image: Path, kind: str) -> None:
    """Raise CommandFailed for an image that is not whole: what is cut off would read as zeroes."""
    try:
        run(["qemu-img", "check", "-q", "-f", kind, image], both=True)
    except CommandFailed as error:
        # 3: only clusters that nothing refers to; 63: it cannot be checked (qemu-img(1)).
        if error.returncode not in (3, 63):
            raise


def _require_one_file(image: Path, kind: str, info: Mapping[str, object]) -> None:
    """Raise BadSource for what would read other files: an image can name any of this host."""
    if kind == "luks":
        raise BadSource("it is encrypted (LUKS)", hint=OPEN_HINT)
    others = set(_OTHER_FILES.findall(json.dumps(info.get("format-specific", {}))))
    others |= {json.dumps(info[key]) for key in ("backing-filename",) if key in info}
    others -= {json.dumps(str(image))}
    if kind not in _FORMATS or others:
        why = f"it needs {', '.join(sorted(others))}" if others else f"it is {kind}"
        raise BadSource(
            f"an image must be one file, and {why}",
            hint="make it one: qemu-img convert -O qcow2 FILE NEW-FILE",
        )


def said(error: CommandFailed) -> str:
    """The end of what a program said that failed."""
    return "\n".join(error.output.strip().splitlines()[-8:])
