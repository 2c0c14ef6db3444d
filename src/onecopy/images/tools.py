"""Builds the tools segment: QEMU's guest agent with its libraries, busybox, onecopy's programs.

Every guest maps it. Therefore images need no software of onecopy, and all guests share one copy.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from onecopy.images.deb_packages import extract_packages, host_suite
from onecopy.images.initramfs import files, resource
from onecopy.images.range_record import Range, SegmentConfig
from onecopy.model import PageClass, Reference
from onecopy.store import Artifact, NewLayer, Store
from onecopy.subprocesses import run

TOOLS_NAME = "onecopy-tools"
#: tcc compiles onecopy's programs and is not part of the segment.
_PACKAGES = ("qemu-guest-agent", "busybox-static", "tcc")
_SCRIPTS = (
    *("start", "session", "exec", "stop", "off", "programs", "unwatched"),
    *("names", "keys", "renew", "timers", "segment", "fit", "processes", "generators", "clone"),
)
#: C programs. "quiet" is a library, and built separately.
_PROGRAMS = ("identity", "watcher", "keeper", "exec")
#: Executable scripts.
_COMMANDS = ("onecopy-segment", "dhcp")


def ensure_tools(
    store: Store, progress: Callable[[str], None] = lambda _: None, *, suite: str = ""
) -> Artifact:
    """Return the tools segment of this version of onecopy; build it if the store lacks it.

    Args:
        store: The store to look in and put into.
        progress: Called with one line of text for each step.
        suite: The Debian suite of its packages; "" for this host's.

    Raises:
        BadSource: The packages cannot be fetched.
    """
    suite = suite or host_suite()
    ref = Reference(TOOLS_NAME, f"{suite}-{_scripts_digest()}")
    found = store.find(ref, "segment")
    if found:
        return found
    with store.workspace() as work:
        from onecopy.images.fs_image import make_image  # the tools are built once

        progress("fetching the guest agent")
        extract_packages(_PACKAGES, suite, work / "debian")
        tree = work / "tools"
        _assemble(work / "debian", tree)
        size = make_image(tree, work / "image", "erofs")
        config = SegmentConfig(ranges=(Range(PageClass.SR, size, "erofs"),), source="onecopy")
        return store.put_own(
            "segment",
            ref,
            config.encode(),
            [
                NewLayer(
                    path=work / "image",
                    media_type="application/vnd.onecopy.image.v1+erofs",
                    annotations={"org.onecopy.role": "image"},
                ),
                NewLayer(
                    path=tree / "bin/busybox",
                    media_type="application/vnd.onecopy.image.v1+elf",
                    annotations={"org.onecopy.role": "busybox"},
                ),
            ],
        )


def _scripts_digest() -> str:
    digest = hashlib.sha256()
    for entry in sorted([*files().iterdir(), *files().joinpath("hooks").iterdir()], key=str):
        if entry.is_file():
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes())
    return digest.hexdigest()[:12]


def ready_hooks() -> list[str]:
    """Return the names of the clone hooks in the tools segment (images/files/hooks)."""
    return sorted(entry.name for entry in files().joinpath("hooks").iterdir())


def _assemble(debian: Path, tree: Path) -> None:
    """Fill ``tree``: bin/ (programs), applets/ (of busybox), lib/ (ld.so, libraries), scripts."""
    for folder in ("bin", "lib", "applets"):
        (tree / folder).mkdir(parents=True)
    busybox = next(p for p in (debian / "usr/bin/busybox", debian / "bin/busybox") if p.is_file())
    agent = debian / "usr/sbin/qemu-ga"
    shutil.copy(busybox, tree / "bin/busybox")
    shutil.copy(agent, tree / "bin/qemu-ga")
    loader = next(debian.glob("**/x86_64-linux-gnu/ld-linux-x86-64.so.2"))
    shutil.copy(loader, tree / "lib/ld.so")
    folders = ":".join(
        str(debian / f) for f in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
    )
    # The unpacked loader ignores this host's libraries.
    unpacked: list[str | Path] = [loader, "--library-path", folders]
    for line in run([*unpacked, "--list", agent]).splitlines():
        name, arrow, rest = line.partition(" => ")
        # The list names the loader by its absolute path, and libraries by plain names.
        if arrow and "/" not in name and str(debian) in rest:
            shutil.copy(rest.split(" (")[0], tree / "lib" / name.strip())
    compiler: list[str | Path] = [*unpacked, debian / "usr/bin/tcc", "-nostdlib", "-nostdinc"]
    for program in _PROGRAMS:
        _compile([*compiler, "-static"], program, tree / "bin" / program)
    _compile([*compiler, "-shared"], "quiet", tree / "lib/quiet.so")
    for applet in run([busybox, "--list"]).split():
        (tree / "applets" / applet).symlink_to("../bin/busybox")
    for name in (*_SCRIPTS, *_COMMANDS):
        (tree / name).write_bytes(resource(name))
    for name in _COMMANDS:
        (tree / name).chmod(0o755)
    (tree / "hooks").mkdir()
    for name in ready_hooks():
        (tree / "hooks" / name).write_bytes(resource(f"hooks/{name}"))


def _compile(compiler: Sequence[str | Path], name: str, out: Path) -> None:
    """Compile a program that uses no libraries and no headers but onecopy's."""
    with tempfile.TemporaryDirectory(dir=out.parent) as sources:
        # A program includes its parts, so all sources must lie beside it.
        for part in files().iterdir():
            if part.name.endswith((".c", ".h")):
                (Path(sources) / part.name).write_bytes(part.read_bytes())
        run([*compiler, "-o", out, Path(sources) / f"{name}.c"])
