"""What a QEMU's command line says about RAM and files, whoever wrote it.

qemu-system(1): -name, -m, -object, -machine, -numa, -mem-path, -drive, -blockdev. Any text gives an
answer: what makes no sense is left out, as is what no QEMU would have that many of. Pure. Not here:
whether any of it is true (external_qemu.py), and our own command line (argv.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec

from onecopy.model import MIB

#: What QEMU gives a machine that does not say (qemu-system(1), -m).
_DEFAULT_RAM = 128 * MIB
#: A comma, doubled, is part of a value (QEMU util/keyval.c).
_PART = re.compile(r"(?:[^,]|,,)+")
_SIZE = re.compile(r"([0-9]{1,19})([bkmgtpe]?)", re.IGNORECASE)
_SHIFTS = {"": 20, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
#: No address space is larger.
_MOST_RAM = 1 << 57
#: Characters of one option, options of one name, and files: more than any QEMU has.
_LONGEST, _MOST, _MOST_FILES = 64 << 10, 1024, 64
_LONGEST_NAME = 128
#: Blocks that stand on each other.
_DEEPEST = 16


class Told(msgspec.Struct, frozen=True):
    """What a command line says; paths are as they stand there."""

    #: As `-name` has it; empty if it has none.
    name: str
    ram_bytes: int
    #: The file that backs RAM, or a folder; None when anonymous.
    ram_path: str | None
    #: Other files that are mapped as memory: path -> the backend's id.
    files: Mapping[str, str]
    disks: tuple[str, ...] = ()


def parse(argv: Sequence[str]) -> Told | None:
    """What a command line says; None if there is no machine: a probe, or a process that ends."""
    options = _options(argv)
    machines = _last(options, ("machine", "M"), "type")
    if not argv or machines.get("type") == "none":
        return None
    backends = {
        name: each
        for each in _all(options, "object", "qom-type")
        if (name := _text(each, "id"))
        and (_text(each, "qom-type") or "").startswith("memory-backend-")
    }
    ram = {_text(machines, "memory-backend")}
    ram |= {_text(each, "memdev") for each in _all(options, "numa", "type")}
    paths = {_text(backends[name], "mem-path") for name in ram if name in backends}
    files = {
        path: name
        for name, each in backends.items()
        if name not in ram and (path := _text(each, "mem-path")) is not None
    }
    default = next(iter(options.get("mem-path", [])[-1:]), None)
    return Told(
        name=(_text(_last(options, ("name",), "guest"), "guest") or "")[:_LONGEST_NAME],
        ram_bytes=_ram_bytes(_text(_last(options, ("m",), "size"), "size") or ""),
        ram_path=(paths.pop() if len(paths) == 1 else None) if paths else default,
        files=dict(islice(files.items(), _MOST_FILES)),
        disks=tuple(islice(dict.fromkeys(_disks(options)), _MOST_FILES)),
    )


def _disks(options: Mapping[str, list[str]]) -> Iterator[str]:
    for name in ("hda", "hdb", "hdc", "hdd", "cdrom"):
        yield from options.get(name, [])
    for each in (*_all(options, "drive", "file"), *_all(options, "blockdev", "driver")):
        yield from _filenames(each, _DEEPEST)


def _filenames(block: Mapping[str, Any], deepest: int) -> Iterator[str]:
    """A block device may stand on another one, given inside it or by the name of a node."""
    for key, value in block.items():
        if isinstance(value, dict) and deepest:
            yield from _filenames(value, deepest - 1)
        elif key in ("file", "filename", "file.filename") and "/" in (_text(block, key) or ""):
            yield value


def _options(argv: Sequence[str]) -> dict[str, list[str]]:
    """Option without its dashes -> its values, in order."""
    found: dict[str, list[str]] = {}
    for option, value in zip(argv, [*argv[1:], ""], strict=False):
        if option.startswith("-") and not value.startswith("-") and len(value) <= _LONGEST:
            values = found.setdefault(option.lstrip("-"), [])
            if len(values) < _MOST:
                values.append(value)
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
        # Thousands of digits are a ValueError, and thousands of brackets a RecursionError.
        with suppress(ValueError, RecursionError):
            found = json.loads(text)
            return found if isinstance(found, dict) else {}
    parts: dict[str, Any] = {}
    for index, part in enumerate(_PART.findall(text)):
        name, separator, value = part.replace(",,", ",").partition("=")
        if separator:
            parts[name] = value
        elif not index:
            parts[first] = name
    return parts


def _text(properties: Mapping[str, Any], name: str) -> str | None:
    """A property that is text; None if it is something else, or not there."""
    value = properties.get(name)
    return value if isinstance(value, str) else None


def _ram_bytes(text: str) -> int:
    """Without a unit it is MiB."""
    found = _SIZE.fullmatch(text)
    size = int(found[1]) << _SHIFTS[found[2].lower()] if found else 0
    return size if 0 < size <= _MOST_RAM else _DEFAULT_RAM
