"""The options of `Host.start`, `Host.boot` and `Host.save`: those of the commands.

Not here: options of the command line (cli/start_options.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from onecopy.errors import InvalidInput
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec
from onecopy.guest.lifecycle.start import Request
from onecopy.guest.transfer.destination import StrPath
from onecopy.model import Mergeable, Reference, check_ports, parse_mount, parse_size
from onecopy.vmm.accel import Choice


class _MachineOptions(TypedDict, total=False):
    segments: Sequence[str]
    """Further segments to load: ``SEGMENT`` or ``SEGMENT:/MOUNTPOINT``."""
    allow_host: bool
    """Whether the guest can reach the host's listening ports. The host's 127.0.0.1 is 198.18.0.2 in
    the guest. Default: False."""
    accel: str
    """The accelerator: ``auto`` (the default), ``kvm`` or ``tcg``."""


class _GroupOptions(TypedDict, total=False):
    name: str | None
    """The guest's name; several guests get NAME-1, NAME-2 and so on. None: onecopy makes one."""
    publish: Iterable[tuple[int, int]]
    """Pairs (port of 127.0.0.1, port of the guest). The host's port counts up from guest to guest;
    0 is any free port, which `Guest.port` returns."""
    bridge: str
    """The host's bridge to connect to; default: a user-mode network."""
    ksm: str
    """The memory that KSM may merge: ``none``, ``ram`` (the guest's RAM, the default) or ``all``
    (QEMU's own memory as well)."""
    disks: Sequence[str]
    """Disks, as for `onecopy run --disk`. The guest syncs them at the end of the block, unless an
    exception ends it."""
    isolated_vmm: bool
    """Whether to start QEMU by exec, with memory addresses and pages of its own. Default: False; a
    server forks the QEMUs of a trust domain."""
    overcommit: bool
    """Whether to start the guests even if the host lacks memory for all. Default: False."""


class BootOptions(_MachineOptions, total=False):
    """Options of `Host.save`: those of `onecopy save --root`."""

    memory: int | str
    """The guest's RAM: bytes, or text such as "256M". Default: 256 MiB."""
    cpus: int
    """The number of vCPUs. Default: 1."""
    cpu: str
    """The CPU model, as for `onecopy boot --cpu`."""
    command: str
    """A command that a minimal init runs in place of the image's init; the guest ends with it."""
    ready: str
    """A shell command that exits with 0 in the guest when the guest is ready."""
    timeout: float
    """Seconds for the guest to boot and become ready. Default: 300."""
    network: bool
    """Whether the guest has a network card. Default: True."""
    kernel: StrPath
    """The kernel image (bzImage) to boot; default: the Debian kernel in the store."""
    modules: StrPath
    """The modules of ``kernel``: its directory lib/modules/RELEASE."""


class GuestBootOptions(BootOptions, _GroupOptions, total=False):
    """Options of `Host.boot`: those of `onecopy boot`."""


class StartOptions(_MachineOptions, _GroupOptions, total=False):
    """Options of `Host.start`: those of `onecopy run`."""

    memory: int | str | None
    """RAM in all, at least as much as saved: bytes, or text such as "256M". None: as saved."""
    cpus: int | None
    """vCPUs in all, at least as many as saved. None: as saved."""


def choice(accel: str) -> Choice:
    """Return the accelerator of that name; raise InvalidInput."""
    if accel not in list(Choice):
        raise InvalidInput(f"there is no accelerator {accel!r}", hint="give auto, kvm or tcg")
    return Choice(accel)


def mergeable(text: str) -> Mergeable:
    """Return the memory that KSM may merge; raise InvalidInput."""
    if text not in list(Mergeable):
        raise InvalidInput(
            f"{text!r} is not memory that KSM may merge", hint="give none, ram or all"
        )
    return Mergeable(text)


_FORMS: dict[str, Callable[[Any], Any]] = {
    "segments": lambda segments: tuple(parse_mount(each) for each in segments),
    "disks": lambda disks: tuple(DiskSpec.parse(each) for each in disks),
    "publish": lambda publish: tuple(check_ports(*pair) for pair in publish),
    "memory": lambda memory: None if memory is None else parse_size(str(memory)),
    "accel": choice,
    "ksm": mergeable,
    "kernel": Path,
    "modules": Path,
}
_GROUP = ("name", "overcommit")


def boot_spec(root: str, options: Mapping[str, Any]) -> BootSpec:
    """Return the specification of a boot; raise InvalidInput."""
    return BootSpec(root=Reference.parse(root), **_fields(options))


def clone_spec(system: str, options: Mapping[str, Any]) -> CloneSpec:
    """Return the specification of a clone; raise InvalidInput."""
    return CloneSpec(system=Reference.parse(system), **_fields(options))


def request(spec: BootSpec | CloneSpec, count: int, options: Mapping[str, Any]) -> Request:
    """Return the request for ``count`` guests."""
    return Request(spec, count, **{key: options[key] for key in _GROUP if key in options})


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in options.items() if key not in _GROUP}
    return {key: _FORMS.get(key, lambda same: same)(value) for key, value in known.items()}
