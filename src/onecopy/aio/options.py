"""How a guest boots, as a program says it: what the options of `onecopy boot` say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from onecopy.errors import InvalidInput
from onecopy.guest.lifecycle.bootplan import BootSpec
from onecopy.guest.transfer.destination import StrPath
from onecopy.model import Mergeable, Reference, parse_mount, parse_size
from onecopy.vmm.accel import Choice


class BootOptions(TypedDict, total=False):
    """How a guest boots: the options of `onecopy boot` and `onecopy save --root`."""

    segments: Sequence[str]
    """Further segments: ``SEGMENT``, or ``SEGMENT:/MOUNTPOINT``."""
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
    allow_host: bool
    """Whether the guest reaches what listens on the host, and not the outside only."""
    accel: str
    """``auto``, ``kvm`` or ``tcg``."""
    kernel: StrPath
    modules: StrPath


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
    "memory": lambda memory: parse_size(str(memory)),
    "accel": choice,
    "kernel": Path,
    "modules": Path,
}


def boot_spec(root: str, options: Mapping[str, Any]) -> BootSpec:
    """What boots; raise InvalidInput."""
    fields = {key: _FORMS.get(key, lambda same: same)(value) for key, value in options.items()}
    if "run" in fields:
        fields["command"] = fields.pop("run")
    return BootSpec(root=Reference.parse(root), **fields)
