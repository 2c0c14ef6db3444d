"""The source ``kernel:FILE``: a kernel by itself, for bare machines (guest/lifecycle/bootplan.py).

Any that boots by Linux's protocol, which is not Linux's alone: memtest86+, or a Linux that brings
its own root. Nothing is added to it. Not here: the kernel of all other guests (images/kernel.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import BadSource, InvalidInput
from onecopy.images.kernel import KernelConfig
from onecopy.images.source_errors import opening
from onecopy.model import Reference
from onecopy.store import Access, Artifact, NewLayer, Store
from onecopy.store.oci import ROLE

PREFIX = "kernel:"
# Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
_MAGIC, _MAGIC_AT = b"HdrS", 0x202


def build_bare(
    store: Store,
    ref: Reference,
    text: str,
    *,
    access: Access | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Take the kernel file ``text`` in as ``ref``, and return it.

    Raises InvalidInput (no name), BadSource, and what `Store.put` raises.
    """
    if not text:
        raise InvalidInput("kernel: names no file", hint="write kernel:FILE")
    path = Path(text)
    with opening("kernel", text, "write kernel:FILE with the path of a kernel image"):
        _require_kernel(path)
    progress(f"taking in {path.name}")
    config = KernelConfig(release="", modules=(), bare=True)
    with store.workspace() as work:
        image = work / "kernel"
        shutil.copyfile(path, image)
        layer = NewLayer(image, "application/vnd.onecopy.image.v1+linux", {ROLE: "kernel"})
        return store.put("kernel", ref, msgspec.json.encode(config), [layer], access=access)


def _require_kernel(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(_MAGIC_AT)
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise BadSource(
            f"{path} is no kernel that boots by Linux's protocol (a bzImage)",
            hint="memtest86+, for example, is one; a disk image is disk:FILE",
        )
