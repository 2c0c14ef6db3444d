"""Parse the RAM and files from the command line of any QEMU.

The options are -name, -m, -object, -machine, -numa, -mem-path, -drive and -blockdev
(qemu-system(1)). Any text gives a result. Invalid parts are ignored, and so is everything beyond
the limits. The functions are pure.

Not here: whether the result is true (external_qemu.py), and our own command line (argv.py).
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

#: QEMU's default if the command line has no size (qemu-system(1), -m).
_DEFAULT_RAM = 128 * MIB
#: A doubled comma is part of a value (QEMU util/keyval.c).
_PART = re.compile(r"(?:[^,]|,,)+")
_SIZE = re.compile(r"([0-9]{1,19})([bkmgtpe]?)", re.IGNORECASE)
_SHIFTS = {"": 20, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
#: The size of the largest address space.
_RAM_LIMIT = 1 << 57
#: Characters of one option, options of one name, and files: more than any QEMU has.
_VALUE_LIMIT, _OPTIONS_LIMIT, _FILES_LIMIT = 64 << 10, 1024, 64
_NAME_LIMIT = 128
#: Nested block devices.
_DEPTH_LIMIT = 16


class QemuOptions(msgspec.Struct, frozen=True):
    """The content of a command line; paths are unchanged."""

    #: The value of `-name`; empty without one.
    name: str
    ram_bytes: int
    #: The file that backs RAM, or a directory; None if anonymous.
    ram_path: str | None
    #: Other files that are mapped as memory: path -> the backend's id.
    files: Mapping[str, str]
    disks: tuple[str, ...] = ()


def parse(argv: Sequence[str]) -> QemuOptions | None:
    """Parse a command line; return None without a machine, as for a probe or an ending process."""
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
    return QemuOptions(
        name=(_text(_last(options, ("name",), "guest"), "guest") or "")[:_NAME_LIMIT],
        ram_bytes=_ram_bytes(_text(_last(options, ("m",), "size"), "size") or ""),
        ram_path=(paths.pop() if len(paths) == 1 else None) if paths else default,
        files=dict(islice(files.items(), _FILES_LIMIT)),
        disks=tuple(islice(dict.fromkeys(_disks(options)), _FILES_LIMIT)),
    )


def _disks(options: Mapping[str, list[str]]) -> Iterator[str]:
    for name in ("hda", "hdb", "hdc", "hdd", "cdrom"):
        yield from options.get(name, [])
    for each in (*_all(options, "drive", "file"), *_all(options, "blockdev", "driver")):
        yield from _filenames(each, _DEPTH_LIMIT)


def _filenames(block: Mapping[str, Any], depth: int) -> Iterator[str]:
    """Yield files of a block device, which may contain other block devices."""
    for key, value in block.items():
        if isinstance(value, dict) and depth:
            yield from _filenames(value, depth - 1)
        elif key in ("file", "filename", "file.filename") and "/" in (_text(block, key) or ""):
            yield value


def _options(argv: Sequence[str]) -> dict[str, list[str]]:
    """Map each option, without dashes, to its values in order."""
    found: dict[str, list[str]] = {}
    for option, value in zip(argv, [*argv[1:], ""], strict=False):
        if option.startswith("-") and not value.startswith("-") and len(value) <= _VALUE_LIMIT:
            values = found.setdefault(option.lstrip("-"), [])
            if len(values) < _OPTIONS_LIMIT:
                values.append(value)
    return found


def _all(options: Mapping[str, list[str]], name: str, first: str) -> list[dict[str, Any]]:
    return [_properties(value, first) for value in options.get(name, [])]


def _last(options: Mapping[str, list[str]], names: Sequence[str], first: str) -> dict[str, Any]:
    """Merge the properties of an option that may occur repeatedly; later ones take precedence."""
    merged: dict[str, Any] = {}
    for name in names:
        for each in _all(options, name, first):
            merged |= each
    return merged


def _properties(text: str, first: str) -> dict[str, Any]:
    """Parse properties; ``first`` is the name of a leading value without one."""
    if text.startswith("{"):
        # Thousands of digits raise ValueError, and thousands of brackets RecursionError.
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
    """Return a property that is text, else None."""
    value = properties.get(name)
    return value if isinstance(value, str) else None


def _ram_bytes(text: str) -> int:
    """Parse a size; without a unit it is in MiB."""
    found = _SIZE.fullmatch(text)
    size = int(found[1]) << _SHIFTS[found[2].lower()] if found else 0
    return size if 0 < size <= _RAM_LIMIT else _DEFAULT_RAM
