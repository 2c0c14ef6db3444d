"""Stores the guests' kernel: its image, an archive of boot modules, and a segment of all modules.

The default is the distribution's cloud kernel package, unpacked but not installed. Modules are
stored uncompressed, so that guests map them in place.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import BadSource
from onecopy.images.deb_packages import fetch_package, host_suite
from onecopy.images.initramfs import cpio
from onecopy.images.tree import walk
from onecopy.images.vmlinux import unpack
from onecopy.model import Reference
from onecopy.store import Artifact, NewLayer, Store
from onecopy.store.artifact import decode_config
from onecopy.store.oci import ROLE
from onecopy.subprocesses import run

KERNEL_NAME = "onecopy-kernel"
#: Candidates in order of preference; the first that the suite has is used.
DEBIAN_PACKAGES = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64")
#: Modules that a guest needs to mount its root. Those built into the kernel are skipped.
BOOT_MODULES = (
    "virtio_pmem",
    "nd_pmem",
    "erofs",
    "ext4",
    "overlay",
    "virtio_console",
    "virtio_net",
)

#: The deepest nesting of module directories.
_MAX_LEVELS = 64
_UNPACKERS = {".xz": "xz", ".zst": "zstd", ".gz": "gzip"}


class KernelConfig(msgspec.Struct, frozen=True):
    """Config record of a kernel artifact."""

    release: str
    """The output of ``uname -r`` in the guest."""
    modules: tuple[str, ...]
    """Files of the boot module archive, in loading order."""
    package: str = ""
    """File name of the Debian package; "" for a kernel given as a file."""
    bare: bool = False
    """Whether it is a bare kernel (images/sources/bare_kernel.py)."""
    schema: int = 1

    @classmethod
    def of(cls, artifact: Artifact) -> KernelConfig:
        """Read the config record of a kernel artifact.

        Raises:
            StoreDamaged: The record cannot be read.
        """
        return decode_config(artifact, cls, "then repeat the command, which fetches it again")


def ensure_kernel(
    store: Store,
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    suite: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Return the kernel to boot guests with; fetch it into the store if it is missing.

    Args:
        store: The store to look in and put into.
        kernel: A bzImage to use in place of the distribution's kernel.
        modules: The ``lib/modules/RELEASE`` directory of ``kernel``.
        suite: The Debian suite to fetch from; "" for this host's.
        progress: Called with one line of text for each step.

    Raises:
        BadSource: The package cannot be fetched, or the given files are not a kernel's.
    """
    if (kernel is None) != (modules is None):
        raise BadSource("--kernel and --modules need each other", hint="give both or neither")
    if kernel is not None and modules is not None:
        return _custom(store, kernel, modules, progress)
    suite = suite or host_suite()
    ref = Reference(KERNEL_NAME, suite)
    found = store.find(ref, "kernel")
    if found:
        return found
    with store.workspace() as work:
        package = fetch_package(DEBIAN_PACKAGES, suite, work, progress)
        progress(f"unpacking {package.name}")
        run(["dpkg-deb", "--extract", package, work / "tree"])
        image = next((work / "tree/boot").glob("vmlinuz-*"))
        folder = next((work / "tree").glob("**/lib/modules/*"))
        return _put(store, ref, image, folder, work, package.name)


def _custom(store: Store, kernel: Path, modules: Path, progress: Callable[[str], None]) -> Artifact:
    if not kernel.is_file():
        raise BadSource(
            f"the kernel {kernel} is not a file", hint="give a kernel image, for example vmlinuz"
        )
    if not (modules / "modules.order").is_file():
        raise BadSource(
            f"{modules} is not a modules directory: it has no modules.order",
            hint="give the directory lib/modules/RELEASE of that kernel",
        )
    _require_shallow(modules.resolve())
    with kernel.open("rb") as file:
        version = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    # A release can contain characters that a version cannot: Debian's have a "+".
    release = re.sub(r"[^A-Za-z0-9._-]", "-", modules.resolve().name)
    ref = Reference(KERNEL_NAME, f"{release}-{version}")
    found = store.find(ref, "kernel")
    if found:
        return found
    progress(f"storing the kernel {modules.resolve().name}")
    with store.workspace() as work:
        image = work / "vmlinuz"
        shutil.copyfile(kernel, image)
        return _put(store, ref, image, modules.resolve(), work, "")


def _require_shallow(modules: Path) -> None:
    """Raise BadSource for a tree that is too deep for the recursive programs that read it."""
    try:
        for path, _ in walk(modules):
            if len(path.parts) - len(modules.parts) > _MAX_LEVELS:
                raise BadSource(
                    f"{modules} has directories nested deeper than {_MAX_LEVELS} levels",
                    hint="give the directory lib/modules/RELEASE of that kernel",
                )
    except OSError as error:
        raise BadSource(
            f"cannot read {modules}: {error.strerror}", hint="give a directory that you may read"
        ) from error


def _put(
    store: Store, ref: Reference, image: Path, modules: Path, work: Path, package: str
) -> Artifact:
    from onecopy.images.fs_image import make_image  # a kernel is imported once

    release = modules.name
    tree = work / "modules" / release
    shutil.copytree(modules, tree, symlinks=True, ignore=shutil.ignore_patterns("build", "source"))
    _decompress(tree)
    _depmod(tree)
    names = _boot_modules(tree, work / "boot")
    archive = work / "boot-modules"
    archive.write_bytes(cpio(work / "boot"))
    make_image(work / "modules", work / "modules.erofs", "erofs")
    config = KernelConfig(release=release, modules=tuple(names), package=package)
    layers = [
        _layer(image, "linux", "kernel"),
        _layer(archive, "cpio", "boot-modules"),
        _layer(work / "modules.erofs", "erofs", "modules"),
    ]
    if unpack(image, work / "vmlinux"):
        layers.append(_layer(work / "vmlinux", "linux", "vmlinux"))
    return store.put_own("kernel", ref, msgspec.json.encode(config), layers)


def boot_image(kernel: Artifact, accel: str) -> Path:
    """Return the file of a kernel that QEMU boots.

    Under KVM that is the bzImage, which randomises the kernel's addresses. Under TCG that would
    take long, so it is the unpacked kernel if there is one (vmlinux.py).
    """
    roles = {layer.annotations.get(ROLE) for layer in kernel.layers}
    return kernel.layer("vmlinux" if accel == "tcg" and "vmlinux" in roles else "kernel").path


def _layer(path: Path, form: str, role: str) -> NewLayer:
    return NewLayer(
        path=path,
        media_type=f"application/vnd.onecopy.image.v1+{form}",
        annotations={ROLE: role},
    )


def _decompress(tree: Path) -> None:
    for suffix, program in _UNPACKERS.items():
        files = sorted(tree.rglob(f"*.ko{suffix}"))
        if files:
            run([program, "--decompress", "--quiet", "--force", *files])
        for left in files:
            left.unlink(missing_ok=True)  # zstd keeps its input


def _depmod(tree: Path) -> None:
    """Write modules.dep, which a package's install script would do."""
    base = tree.parent.parent / "depmod"
    (base / "lib").mkdir(parents=True)
    (base / "lib/modules").symlink_to(tree.parent)
    run(["depmod", "--basedir", base, tree.name])


def _boot_modules(tree: Path, out: Path) -> list[str]:
    """Copy the boot modules and their dependencies to ``out``; return them in loading order."""
    needs: dict[str, list[str]] = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {Path(path).stem.replace("-", "_"): path for path in needs}
    order: list[str] = []
    for name in BOOT_MODULES:
        if name in by_name:
            # modules.dep lists the nearest dependency first.
            _append(order, [*reversed(needs[by_name[name]]), by_name[name]])
    (out / "modules").mkdir(parents=True)
    for path in order:
        shutil.copyfile(tree / path, out / "modules" / Path(path).name)
    return [f"modules/{Path(path).name}" for path in order]


def _append(order: list[str], paths: Sequence[str]) -> None:
    order += [path for path in paths if path not in order]
