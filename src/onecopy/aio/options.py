"""What a program says when it starts, boots or saves guests: what the commands' options say."""

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
    """Further segments: ``SEGMENT``, or ``SEGMENT:/MOUNTPOINT``."""
    allow_host: bool
    """Whether the guest reaches what listens on the host (127.0.0.1 is its 198.18.0.2), and not the
    outside only."""
    accel: str
    """``auto``, ``kvm`` or ``tcg``."""


class _GroupOptions(TypedDict, total=False):
    name: str | None
    """The guest's, or NAME-1..N for several; None: one is made."""
    publish: Iterable[tuple[int, int]]
    """(port of 127.0.0.1, port of the guest) pairs. The host's ports count up from guest to guest;
    0 is any free one, which `Guest.port` tells."""
    bridge: str
    """A bridge of the host's, to be ports of."""
    ksm: str
    """What KSM may merge: ``none``, ``ram`` or ``all``, QEMU's own memory included."""
    disks: Sequence[str]
    """As `onecopy run --disk` has them. They are synced at the end of the block, unless it ends by
    an exception."""
    overcommit: bool
    """The host need not have the memory for all."""


class BootOptions(_MachineOptions, total=False):
    """How a guest boots: the options of `onecopy boot` and `onecopy save --root`."""

    memory: int | str
    """Bytes, or for example "256M"."""
    cpus: int
    cpu: str
    """CPU model."""
    run: str
    """A command to run with a minimal init in place of the image's own; the guest ends with it."""
    ready: str
    """A command that exits 0 in the guest once it is ready."""
    timeout: float
    """Seconds that booting and getting ready may take."""
    network: bool
    kernel: StrPath
    modules: StrPath


class GuestBootOptions(BootOptions, _GroupOptions, total=False):
    """How guests boot and what they are given: the options of `onecopy boot`."""


class StartOptions(_MachineOptions, _GroupOptions, total=False):
    """What guests from a saved system are given: the options of `onecopy run`."""

    memory: int | str | None
    """Bytes, or for example "256M": more than was saved."""
    cpus: int | None
    """More than were saved."""


def choice(accel: str) -> Choice:
    """The accelerator that was asked for; raise InvalidInput."""
    if accel not in list(Choice):
        raise InvalidInput(f"{accel!r} is no accelerator", hint="auto, kvm or tcg")
    return Choice(accel)


def mergeable(text: str) -> Mergeable:
    """What KSM may merge; raise InvalidInput."""
    if text not in list(Mergeable):
        raise InvalidInput(f"{text!r} is nothing that KSM can do", hint="none, ram or all")
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
    """What boots; raise InvalidInput."""
    fields = _fields(options)
    if "run" in fields:
        fields["command"] = fields.pop("run")
    return BootSpec(root=Reference.parse(root), **fields)


def clone_spec(system: str, options: Mapping[str, Any]) -> CloneSpec:
    """What starts from a saved system; raise InvalidInput."""
    return CloneSpec(system=Reference.parse(system), **_fields(options))


def request(spec: BootSpec | CloneSpec, count: int, options: Mapping[str, Any]) -> Request:
    """The guests that are asked for."""
    return Request(spec, count, **{key: options[key] for key in _GROUP if key in options})


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in options.items() if key not in _GROUP}
    return {key: _FORMS.get(key, lambda same: same)(value) for key, value in known.items()}
