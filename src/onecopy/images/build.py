"""Builds a segment or a bare kernel from a source: `onecopy build`.

Not here: the sources (source.py, images/sources), the file system image (fs_image.py), the guests'
initramfs (initramfs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from onecopy.errors import InvalidInput
from onecopy.images.fs_image import check_fs, make_image
from onecopy.images.range_record import MEDIA_TYPE, Range, SegmentConfig, check, role
from onecopy.images.skipped import SKIPPED
from onecopy.images.source import open_source
from onecopy.images.sources.bare_kernel import PREFIX, build_bare
from onecopy.images.tree import find_init
from onecopy.model import HUGE_PAGE_SIZE, PageClass, Reference, format_size
from onecopy.store.artifact import NewLayer
from onecopy.store.oci import ROLE

if TYPE_CHECKING:
    from pathlib import Path

    from onecopy.images.source import Source
    from onecopy.store.access import Access
    from onecopy.store.artifact import Artifact
    from onecopy.store.store import Store


class BuildOptions(msgspec.Struct, frozen=True):
    """Options of a segment build."""

    include: tuple[str, ...] = ()
    """Debian packages to install."""
    fs: str = "erofs"
    """File system: ``erofs`` or ``ext2``."""
    page_class: PageClass = PageClass.SR
    """How guests map the segment."""
    room: int = 0
    """Bytes to leave free in an ext2 image for later changes."""


_DEFAULTS = BuildOptions()


def build_segment(
    store: Store,
    ref: Reference,
    source: str,
    options: BuildOptions = _DEFAULTS,
    *,
    access: Access | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Build ``source`` and store it as ``ref``.

    The same source and options give the same digest. A build that fails or is interrupted leaves
    nothing in the store.

    Args:
        store: The store to put the segment into.
        ref: The name and version to give.
        source: The source as text: see `open_source` and `build_bare`.
        options: Packages, file system, page class and free space.
        access: Access rights of a new name.
        progress: Called with one line of text for each step.

    Raises:
        InvalidInput: The source or the options are malformed.
        BadSource: The source cannot be read or stored.
        OnecopyError: Any other error of the source, the image tools or `Store.put`.
    """
    bare = source.startswith(PREFIX)
    store.require_free("kernel" if bare else "segment", ref, access)
    if bare:
        if options != _DEFAULTS:
            raise InvalidInput(
                "a bare kernel takes no packages, file system, page class or free space",
                hint="omit --include, --fs, --class and --free-space",
            )
        path = source.removeprefix(PREFIX)
        return build_bare(store, ref, path, access=access, progress=progress)
    _check_options(options)
    opened = open_source(source, options.include, store=store)
    with store.workspace() as work:
        lost: list[str] = []
        config, image = _write(opened, options, work, lost, progress)
        size = config.ranges[0].size
        progress(f"storing {format_size(size)}")
        kind = f"{MEDIA_TYPE}+{options.fs}"
        layer = NewLayer(path=image, media_type=kind, annotations={ROLE: role(0)}, size=size)
        built = store.put("segment", ref, config.encode(), [layer], access=access)
    if left_out := [*opened.left_out, *lost]:
        progress(f"{SKIPPED}{'; '.join(left_out)}")
    return built


def _check_options(options: BuildOptions) -> None:
    """Raise InvalidInput for options that exclude each other."""
    check_fs(options.fs)
    check([Range(options.page_class, HUGE_PAGE_SIZE, options.fs)])
    if options.room and options.fs == "erofs":
        raise InvalidInput(
            "an EROFS image is read-only and cannot have free space", hint="use --fs ext2"
        )


def _write(
    source: Source,
    options: BuildOptions,
    work: Path,
    lost: list[str],
    progress: Callable[[str], None],
) -> tuple[SegmentConfig, Path]:
    """Unpack ``source`` and write its image; add what the image cannot hold to ``lost``."""
    into = work / "tree"
    into.mkdir()
    tree = source.unpack(into, progress)
    progress(f"writing the {options.fs} image")
    image = work / "image"
    size = make_image(tree, image, options.fs, options.room, left_out=lost)
    config = SegmentConfig(
        ranges=(Range(options.page_class, size, options.fs),),
        source=source.label,
        include=tuple(sorted(set(options.include))),
        init=find_init(tree),
    )
    return config, image
