"""Open a store: create missing parts, and refuse directories that are not a store.

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

_OWN_NAMES = {
    *("lock", "tmp", "leases", "live", "cache", "reserve"),
    *("blobs", "index.json", "oci-layout", "lost+found"),
}
#: Characters that apt and mmdebstrap do not support in a path.
_UNSUPPORTED = '":\\'
_PATH_LIMIT, _NAME_LIMIT, _SHOWN = 512, 255, 128


def open_layout(root: Path) -> Layout:
    """Open the store at ``root``, created if missing.

    Raises:
        InvalidInput: the path is not supported, or the directory is used for something else.
        NotPermitted: this user may not change the store.
        InsufficientResources: the disk is full.
        StoreDamaged: a record is missing or not valid.
        Incompatible: it is on a network file system, or has an unknown version.
    """
    _require_usable_path(root)
    layout = Layout(Path(os.path.abspath(root)))  # noqa: PTH100 - Path.absolute() keeps ".."
    try:
        with file_errors(_existing(layout.root)):
            _require_local(_existing(layout.root))
            _make_directories(layout)
            if not (layout.mark.exists() and layout.index.exists()):
                _make_records(layout)
            data = layout.mark.read_bytes()
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidInput(
            f"{error.filename} exists and is not a directory",
            hint="set ONECOPY_HOME to another directory",
        ) from error
    _check_mark(layout, data)
    return layout


def _require_usable_path(root: Path) -> None:
    """Require a path that the programs of a store can work with.

    apt treats some characters as special, records are UTF-8, and names below need space.

    Raises:
        InvalidInput: the path is not supported.
    """
    reason = _unsupported_reason(os.fspath(root))
    if not reason:
        # Programs receive the path without links.
        reason = _unsupported_reason(os.path.realpath(root))
    if reason:
        shown = os.fspath(root)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}[...]"
        raise InvalidInput(
            f"the store cannot be in {shown!a}: {reason}",
            hint="set ONECOPY_HOME to another directory",
        )


def _unsupported_reason(path: str) -> str:
    odd = next((c for c in path if c in _UNSUPPORTED or unicodedata.category(c) == "Cc"), "")
    if odd:
        return f"its path contains {odd!a}"
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "its path is not UTF-8"
    if len(raw) > _PATH_LIMIT or any(len(part) > _NAME_LIMIT for part in raw.split(b"/")):
        limit = f"{_PATH_LIMIT} bytes, {_NAME_LIMIT} for each name"
        return f"its path is too long: the limit is {limit}"
    return ""


def _require_local(path: Path) -> None:
    # flock(2) and mapped files must behave the same for all users of the store.
    kind = remote_kind(path)
    if kind:
        raise Incompatible(
            f"{path} is on a network file system ({kind}), whose locks and mapped files are not "
            "reliable enough for guests",
            hint="set ONECOPY_HOME to a directory on a local disk",
        )


def _existing(path: Path) -> Path:
    return next(directory for directory in (path, *path.parents) if directory.exists())


def _make_directories(layout: Layout) -> None:
    root = layout.root
    if not root.exists():
        # The XDG Base Directory Specification requires mode 0700 for each directory created on the
        # way.
        for directory in (*reversed(root.parents), root):
            directory.mkdir(mode=0o700, exist_ok=True)
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(root))
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, "permission denied", str(root))
    if not layout.mark.exists():
        unknown = sorted({entry.name for entry in root.iterdir()} - _OWN_NAMES)
        if unknown:
            raise InvalidInput(
                f"{root} is not a store: it contains {unknown[0]!r} but no 'oci-layout'",
                hint="set ONECOPY_HOME to an empty or new directory",
            )
    for directory in (layout.tmp, layout.leases, layout.live, layout.cache, layout.blobs):
        if not directory.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _make_records(layout: Layout) -> None:
    # The mark comes last, because a missing index is damage in a store with a mark.
    with layout.locked():
        if layout.mark.exists() and not layout.index.exists():
            # An empty index would make garbage collection remove every blob.
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
            f"{layout.root} is an OCI layout of version {mark.image_layout_version!r}, which "
            "this onecopy does not support",
            hint="set ONECOPY_HOME to another directory; supported is version "
            f"{oci.LAYOUT_VERSION}",
        )
