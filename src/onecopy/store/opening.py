"""Opening a store: what is missing is made, what is not a store is refused.

Not here: what a crash left behind (collect.py).
"""

from __future__ import annotations

import errno
import os
import unicodedata
from pathlib import Path

from onecopy.errors import Incompatible, InvalidInput, StoreDamaged
from onecopy.linux.statfs import remote_kind
from onecopy.store import oci
from onecopy.store.disk import file_errors
from onecopy.store.layout import Layout

_OURS = {
    *("lock", "tmp", "leases", "live", "cache", "reserve"),
    *("blobs", "index.json", "oci-layout", "lost+found"),
}
#: What apt and mmdebstrap cannot have in a path.
_ODD = '":\\'
_MOST_PATH, _MOST_NAME, _SHOWN = 512, 255, 128


def open_layout(root: Path) -> Layout:
    """The store in ``root``, made if it is missing.

    Raises InvalidInput (the folder is something else's), NotPermitted, InsufficientResources,
    StoreDamaged, or Incompatible (a network file system, or a version of the OCI layout that we do
    not know).
    """
    _require_plain(root)
    layout = Layout(Path(os.path.abspath(root)))  # noqa: PTH100 - Path.absolute() keeps ".."
    try:
        with file_errors(_existing(layout.root)):
            _require_local(_existing(layout.root))
            _make_folders(layout)
            if not (layout.mark.exists() and layout.index.exists()):
                _make_records(layout)
            data = layout.mark.read_bytes()
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidInput(
            f"{error.filename} is in the way: not a folder",
            hint="set ONECOPY_HOME to another folder",
        ) from error
    _check_mark(layout, data)
    return layout


def _require_plain(root: Path) -> None:
    """Raise InvalidInput for a path with which programs that a store needs cannot work.

    apt takes some characters for its own, records are UTF-8, and names below need room.
    """
    why = _why_not(os.fspath(root))
    if not why:
        # Programs are given where links lead.
        why = _why_not(os.path.realpath(root))
    if why:
        shown = os.fspath(root)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}[...]"
        raise InvalidInput(
            f"the store cannot lie in {shown!a}: {why}", hint="set ONECOPY_HOME to another folder"
        )


def _why_not(path: str) -> str:
    odd = next((c for c in path if c in _ODD or unicodedata.category(c) == "Cc"), "")
    if odd:
        return f"its path holds {odd!a}"
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "its path is not UTF-8"
    if len(raw) > _MOST_PATH or any(len(part) > _MOST_NAME for part in raw.split(b"/")):
        limit = f"{_MOST_PATH} bytes, and a name in it {_MOST_NAME}"
        return f"its path is too long: it may have {limit}"
    return ""


def _require_local(path: Path) -> None:
    # flock(2) and what guests map must mean the same to all who use the store.
    kind = remote_kind(path)
    if kind:
        raise Incompatible(
            f"{path} is on a network file system ({kind}): its locks and its mapped files are not "
            "what guests need",
            hint="set ONECOPY_HOME to a folder on a disk of this host",
        )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _make_folders(layout: Layout) -> None:
    root = layout.root
    if not root.exists():
        # The XDG base directory specification asks for 0700 on every folder made on the way.
        for folder in (*reversed(root.parents), root):
            folder.mkdir(mode=0o700, exist_ok=True)
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(root))
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, "no right to write", str(root))
    if not layout.mark.exists():
        strangers = sorted({entry.name for entry in root.iterdir()} - _OURS)
        if strangers:
            raise InvalidInput(
                f"{root} is not a store: it holds {strangers[0]!r} and no 'oci-layout'",
                hint="set ONECOPY_HOME to an empty or a new folder",
            )
    for folder in (layout.tmp, layout.leases, layout.live, layout.cache, layout.blobs):
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _make_records(layout: Layout) -> None:
    # The mark comes last: with a mark, a missing index is damage.
    with layout.locked():
        if layout.mark.exists() and not layout.index.exists():
            # Making an empty one would give every blob to the garbage collection.
            raise StoreDamaged(
                f"{layout.index} is missing",
                hint="restore it from a backup; without one, move the store away and build again",
            )
        if not layout.index.exists():
            layout.write(layout.index, oci.encode(oci.EMPTY_INDEX))
        if not layout.mark.exists():
            mark = oci.LayoutMark(image_layout_version=oci.LAYOUT_VERSION)
            layout.write(layout.mark, oci.encode(mark))


def _check_mark(layout: Layout, data: bytes) -> None:
    right = oci.encode(oci.LayoutMark(image_layout_version=oci.LAYOUT_VERSION))
    mark = oci.decode(data, oci.LayoutMark, layout.mark, f"it must be {right.decode()}")
    if mark.image_layout_version != oci.LAYOUT_VERSION:
        raise Incompatible(
            f"{layout.root} is an OCI layout of version {mark.image_layout_version!r}",
            hint=f"this onecopy knows {oci.LAYOUT_VERSION}: set ONECOPY_HOME to another folder",
        )
