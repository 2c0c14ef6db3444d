"""A source -> a segment in the store, or a kernel by itself: `onecopy build`.

Not here: the sources (source.py, images/sources/bare_kernel.py), the image (fs_image.py), what else
guests boot with (initramfs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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
    from onecopy.store.access import Access
    from onecopy.store.artifact import Artifact
    from onecopy.store.store import Store


def build_segment(
    store: Store,
    ref: Reference,
    source: str,
    *,
    include: Sequence[str] = (),
    fs: str = "erofs",
    page_class: PageClass = PageClass.SR,
    room: int = 0,
    access: Access | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Build ``source`` (see `open_source`, `build_bare`) into ``ref``, and return it.

    The same source gives the same digest. ``include`` are Debian packages, ``fs`` is ``erofs`` or
    ``ext2``, ``room`` bytes that ext2 has free for later changes; guests map it as ``page_class``.
    A new name gets ``access``. ``progress`` is told each step. What fails, or is interrupted before
    ``ref`` is named, leaves nothing behind. Raises InvalidInput, BadSource, InsufficientResources,
    NotPermitted, MissingProgram, and what `Store.put` raises.
    """
    store.require_free("kernel" if source.startswith(PREFIX) else "segment", ref, access)
    if source.startswith(PREFIX):
        if include or room or fs != "erofs" or page_class is not PageClass.SR:
            raise InvalidInput(
                "a kernel by itself has no packages, no file system and no class",
                hint="leave --include, --fs, --class and --room out",
            )
        path = source.removeprefix(PREFIX)
        return build_bare(store, ref, path, access=access, progress=progress)
    check_fs(fs)
    check([Range(page_class, HUGE_PAGE_SIZE, fs)])
    if room and fs == "erofs":
        raise InvalidInput("an EROFS image has no free room", hint="use --fs ext2")
    opened = open_source(source, include, store=store)
    with store.workspace() as work:
        into = work / "tree"
        into.mkdir()
        tree = opened.unpack(into, progress)
        progress(f"writing the {fs} image")
        image = work / "image"
        lost: list[str] = []
        size = make_image(tree, image, fs, room, left_out=lost)
        config = SegmentConfig(
            ranges=(Range(page_class, size, fs),),
            source=opened.label,
            include=tuple(sorted(set(include))),
            init=find_init(tree),
        )
        progress(f"storing {format_size(size)}")
        layer = NewLayer(
            path=image, media_type=f"{MEDIA_TYPE}+{fs}", annotations={ROLE: role(0)}, size=size
        )
        built = store.put("segment", ref, config.encode(), [layer], access=access)
    if left_out := [*opened.left_out, *lost]:
        progress(f"left out: {'; '.join(left_out)}")
    return built
