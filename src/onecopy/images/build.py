"""A source -> a segment in the store, or a kernel by itself: `onecopy build`.

Not here: the sources (source.py, images/sources/bare_kernel.py), the image (fs_image.py), what else
guests boot with (initramfs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from onecopy.errors import InvalidInput
from onecopy.images.fs_image import check_fs, make_image
from onecopy.images.range_record import MEDIA_TYPE, Range, SegmentConfig, check, role
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
    """What goes into a segment beside its source, and how guests map it."""

    include: tuple[str, ...] = ()
    """Debian packages."""
    fs: str = "erofs"
    """File system: ``erofs`` or ``ext2``."""
    page_class: PageClass = PageClass.SR
    room: int = 0
    """Bytes that ext2 has free for later changes."""


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
    """Build ``source`` (see `open_source`, `build_bare`) into ``ref``, and return it.

    The same source and ``options`` give the same digest. A new name gets ``access``. ``progress``
    is told each step. A build that fails, or is interrupted before ``ref`` is named, leaves nothing
    behind. Raises InvalidInput, BadSource, InsufficientResources, NotPermitted, MissingProgram, and
    what `Store.put` raises.
    """
    bare = source.startswith(PREFIX)
    store.require_free("kernel" if bare else "segment", ref, access)
    if bare:
        if options != _DEFAULTS:
            raise InvalidInput(
                "a kernel by itself has no packages, no file system and no class",
                hint="leave --include, --fs, --class and --free-space out",
            )
        path = source.removeprefix(PREFIX)
        return build_bare(store, ref, path, access=access, progress=progress)
    _require_sense(options)
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
        progress(f"left out: {'; '.join(left_out)}")
    return built


def _require_sense(options: BuildOptions) -> None:
    """Raise InvalidInput unless there can be such an image."""
    check_fs(options.fs)
    check([Range(options.page_class, HUGE_PAGE_SIZE, options.fs)])
    if options.room and options.fs == "erofs":
        raise InvalidInput("an EROFS image has no free room", hint="use --fs ext2")


def _write(
    source: Source,
    options: BuildOptions,
    work: Path,
    lost: list[str],
    progress: Callable[[str], None],
) -> tuple[SegmentConfig, Path]:
    """Unpack ``source`` and make its image; ``lost`` gets what the image cannot hold."""
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
