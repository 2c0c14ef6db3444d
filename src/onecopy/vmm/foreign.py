"""QEMU processes that others started: libvirt's, hand-started ones, those of another store.

What a command line says about RAM and files (qemu-system(1): -name, -m, -object, -machine, -numa,
-mem-path); nothing is asked of the QEMU itself. Not here: our own command line (argv.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import msgspec
from msgspec.structs import replace

from onecopy.errors import InvalidInput, NotFound
from onecopy.host import process
from onecopy.host.files import ROOT, process_folder
from onecopy.model import MIB, parse_size

#: Debian's names, Red Hat's, and that of old packages.
_PROGRAM = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm|kvm")
#: What QEMU gives a machine that does not say (qemu-system(1), -m).
_DEFAULT_RAM = 128 * MIB
#: A comma, doubled, is part of a value (QEMU util/keyval.c).
_PART = re.compile(r"(?:[^,]|,,)+")


class Vmm(msgspec.Struct, frozen=True):
    """A QEMU process, and what its command line says."""

    pid: int
    #: As `-name` has it, else ``pid PID``.
    name: str
    #: The RAM that its guest sees, in bytes.
    ram_bytes: int
    #: The file that backs it; a folder where QEMU makes one (hugetlbfs); None when anonymous.
    ram_path: str | None
    #: Other files that it maps as memory (virtio-pmem, NVDIMM): path -> the backend's id.
    files: Mapping[str, str]
    #: Files of its disks.
    disks: tuple[str, ...] = ()


def find(known: Container[int], root: Path = ROOT) -> list[Vmm]:
    """All QEMU processes with a machine, but those whose process id is in ``known``, by pid."""
    return sorted(_find(known, root), key=lambda vmm: vmm.pid)


def _find(known: Container[int], root: Path) -> Iterator[Vmm]:
    for folder in (root / "proc").glob("[1-9]*"):
        pid = int(folder.name)
        if pid in known:
            continue
        with suppress(NotFound):
            if _PROGRAM.fullmatch(_program(pid, root)) and (
                vmm := parse(pid, process.cmdline(pid, root))
            ):
                yield _resolved(vmm, root)


def _program(pid: int, root: Path) -> str:
    """The name of the program; of another user's process what it was called as."""
    try:
        path = str((process_folder(pid, root) / "exe").readlink())
    except OSError:
        path = next(iter(process.cmdline(pid, root)), "")
    return PurePath(path.removesuffix(" (deleted)")).name


def parse(pid: int, argv: Sequence[str]) -> Vmm | None:
    """What a command line says; None if there is no machine: a probe, or a process that ends."""
    options = _options(argv)
    machines = _last(options, ("machine", "M"), "type")
    if not argv or machines.get("type") == "none":
        return None
    backends = {str(each.get("id")): each for each in _all(options, "object", "qom-type")}
    backends = {
        name: each
        for name, each in backends.items()
        if str(each.get("qom-type")).startswith("memory-backend-")
    }
    ram = {machines.get("memory-backend")}
    ram |= {each.get("memdev") for each in _all(options, "numa", "type")}
    paths = {_path(backends[name]) for name in ram if name in backends}
    files = {
        path: name
        for name, each in backends.items()
        if name not in ram and (path := _path(each)) is not None
    }
    named = _last(options, ("name",), "guest")
    default = next(iter(options.get("mem-path", [])[-1:]), None)
    return Vmm(
        pid=pid,
        name=str(named.get("guest", f"pid {pid}")),
        ram_bytes=_ram_bytes(_last(options, ("m",), "size")),
        ram_path=(paths.pop() if len(paths) == 1 else None) if paths else default,
        files=files,
        disks=tuple(dict.fromkeys(_disks(options))),
    )


def _disks(options: Mapping[str, list[str]]) -> Iterator[str]:
    for name in ("hda", "hdb", "hdc", "hdd", "cdrom"):
        yield from options.get(name, [])
    for each in (*_all(options, "drive", "file"), *_all(options, "blockdev", "driver")):
        yield from _filenames(each)


def _filenames(block: Mapping[str, Any]) -> Iterator[str]:
    """A block device may stand on another one, given inside it or by the name of a node."""
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _filenames(value)
        elif key in ("file", "filename", "file.filename") and "/" in value:
            yield str(value)


def _resolved(vmm: Vmm, root: Path) -> Vmm:
    """With paths as the kernel shows them: absolute, and without symbolic links."""
    own = process_folder(vmm.pid, root)
    folder = Path()
    with suppress(OSError):
        folder = (own / "cwd").readlink()

    def real(path: str) -> str:
        # A descriptor of its own.
        return os.path.realpath(folder / path.replace("/proc/self/", f"{own}/", 1))

    return replace(
        vmm,
        ram_path=None if vmm.ram_path is None else real(vmm.ram_path),
        files={real(path): name for path, name in vmm.files.items()},
        disks=tuple(map(real, vmm.disks)),
    )


def _options(argv: Sequence[str]) -> dict[str, list[str]]:
    """Option without its dashes -> its values, in order."""
    found: dict[str, list[str]] = {}
    for option, value in zip(argv, [*argv[1:], ""], strict=False):
        if option.startswith("-") and not value.startswith("-"):
            found.setdefault(option.lstrip("-"), []).append(value)
    return found


def _all(options: Mapping[str, list[str]], name: str, first: str) -> list[dict[str, Any]]:
    return [_properties(value, first) for value in options.get(name, [])]


def _last(options: Mapping[str, list[str]], names: Sequence[str], first: str) -> dict[str, Any]:
    """The properties of an option that may be given several times, later ones in preference."""
    merged: dict[str, Any] = {}
    for name in names:
        for each in _all(options, name, first):
            merged |= each
    return merged


def _properties(text: str, first: str) -> dict[str, Any]:
    """``first`` is the name of a leading value that has none."""
    if text.startswith("{"):
        with suppress(ValueError):
            return dict(json.loads(text))
    found: dict[str, Any] = {}
    for index, part in enumerate(_PART.findall(text)):
        name, separator, value = part.replace(",,", ",").partition("=")
        if separator:
            found[name] = value
        elif not index:
            found[first] = name
    return found


def _path(backend: Mapping[str, Any]) -> str | None:
    path = backend.get("mem-path")
    return None if path is None else str(path)


def _ram_bytes(memory: Mapping[str, Any]) -> int:
    text = str(memory.get("size", ""))
    with suppress(InvalidInput):
        # Without a unit it is MiB.
        return parse_size(text) * (MIB if text.isdecimal() else 1)
    return _DEFAULT_RAM
