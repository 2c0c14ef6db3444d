"""A source -> a segment in the store: `onecopy build`.

Not here: the sources (source.py), the image (image.py), what else guests boot with (bootfiles.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from onecopy.build.image import check_fs, make_image
from onecopy.build.source import open_source
from onecopy.build.tree import find_init
from onecopy.errors import InvalidInput
from onecopy.model import Reference, format_size
from onecopy.store.artifact import NewLayer
from onecopy.store.oci import ROLE

if TYPE_CHECKING:
    from onecopy.store.artifact import Artifact
    from onecopy.store.store import Store

#: Media type of an image layer, without its file system's name.
MEDIA_TYPE = "application/vnd.onecopy.image.v1"


def build_segment(
    store: Store,
    ref: Reference,
    source: str,
    *,
    include: Sequence[str] = (),
    fs: str = "erofs",
    progress: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Build ``source`` (see `open_source`) into the segment ``ref``, and return it.

    The same source gives the same digest. ``include`` are Debian packages, ``fs`` is ``erofs`` or
    ``ext2``; ``progress`` is told each step. What fails or is interrupted leaves nothing behind.
    Raises InvalidInput, BadSource, NotEnough, NotPermitted, MissingProgram, and what `Store.put`
    raises.
    """
    check_fs(fs)
    if ref.digest:
        raise InvalidInput(f"{ref} cannot be a new name", hint="use NAME:VERSION")
    opened = open_source(source, include)
    with store.workspace() as work:
        into = work / "tree"
        into.mkdir()
        tree = opened.unpack(into, progress)
        progress(f"writing the {fs} image")
        image = work / "image"
        size = make_image(tree, image, fs)
        record = {
            "schema": 1,
            "fs": fs,
            "size": size,
            "source": opened.label,
            "include": sorted(set(include)),
            "init": find_init(tree),
        }
        progress(f"storing {format_size(size)}")
        layer = NewLayer(
            path=image, media_type=f"{MEDIA_TYPE}+{fs}", annotations={ROLE: "image"}, size=size
        )
        config = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        return store.put("segment", ref, config, [layer])
