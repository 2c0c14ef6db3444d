"""The source ``kernel:FILE``: a bare kernel, booted without a root segment or an agent.

Any kernel that follows the Linux/x86 boot protocol works: memtest86+, or a Linux with its own root.
It is stored unchanged. Not here: the kernel of all other guests (images/kernel.py).
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
    """Store the kernel file ``text`` as ``ref``.

    Raises:
        InvalidInput: ``text`` is empty.
        BadSource: The file cannot be read or is not a kernel.
        OnecopyError: Any error of `Store.put`.
    """
    if not text:
        raise InvalidInput("the source kernel: has no file name", hint="write kernel:FILE")
    path = Path(text)
    with opening("kernel", text, "write kernel:FILE with the path of a kernel image"):
        _require_kernel(path)
    progress(f"storing {path.name}")
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
            f"{path} is not a kernel with the Linux/x86 boot protocol (a bzImage)",
            hint="give a bzImage, for example of memtest86+; for a disk image write disk:FILE",
        )
