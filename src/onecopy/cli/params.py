"""Parameter types and options that several commands share; names complete from the store."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from onecopy.errors import InvalidInput
from onecopy.model import Reference, parse_size

_F = TypeVar("_F", bound=Callable[..., Any])


class ReferenceType(click.ParamType[Any]):
    """A segment, saved system or kernel (of ``kind``)."""

    name = "reference"

    def __init__(self, kind: str | None = None) -> None:
        self._kind = kind

    def convert(self, value: Any, param: object, ctx: object) -> Reference:
        return value if isinstance(value, Reference) else Reference.parse(value)

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        from onecopy.store import Store

        found = Store().artifacts(self._kind)
        return [CompletionItem(a.ref) for a in found if a.ref.startswith(incomplete)]


class GuestType(click.ParamType[Any]):
    """A running guest."""

    name = "guest"

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        from onecopy.guest.host import Host

        guests = Host.open().guests()
        return [CompletionItem(g.name) for g in guests if g.name.startswith(incomplete)]


class SizeType(click.ParamType[Any]):
    """Bytes: 256M, 1G."""

    name = "size"

    def convert(self, value: Any, param: object, ctx: object) -> int:
        return value if isinstance(value, int) else parse_size(value)


class PublishType(click.ParamType[Any]):
    """[HOST:]GUEST ports."""

    name = "[host:]guest"

    def convert(self, value: Any, param: object, ctx: object) -> tuple[int, int]:
        host, _, guest = str(value).rpartition(":")
        # int() takes more digits than these, and isdigit() more than int().
        if not re.fullmatch("[0-9]+", guest) or not re.fullmatch("[0-9]*", host):
            raise InvalidInput(f"{value!r} is not a port pair", hint="write for example -p 8080:80")
        ports = int(host or 0), int(guest)
        if not (0 <= ports[0] < 65536 and 0 < ports[1] < 65536):
            raise InvalidInput(f"{value!r} is not a port pair", hint="ports are 1 to 65535")
        return ports


class MountType(click.ParamType[Any]):
    """SEGMENT:/MOUNTPOINT."""

    name = "segment:/mountpoint"

    def convert(self, value: Any, param: object, ctx: object) -> tuple[Reference, str]:
        text, _, mountpoint = str(value).rpartition(":/")
        if not text:
            raise InvalidInput(
                f"{value!r} does not say where to mount the segment",
                hint="write for example --segment data:/srv/data",
            )
        return Reference.parse(text), "/" + mountpoint.rstrip("/")


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def cold_options(command: _F) -> _F:
    """The options of what boots a guest: `save` and `run --cold`."""
    options = (
        click.option(
            "--segment",
            "segments",
            multiple=True,
            type=MountType(),
            help="Map a further segment, mounted there. May be repeated.",
        ),
        click.option(
            "--memory", type=SizeType(), default="256M", show_default=True, help="RAM of the guest."
        ),
        click.option(
            "--cpus",
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Processors of the guest.",
        ),
        click.option(
            "--cpu",
            default="x86-64-v2",
            show_default=True,
            metavar="MODEL",
            help="CPU model: x86-64-v2 or -v3, which nearly every host has; host (with KVM) or "
            "max, all that this one has; or another of QEMU's.",
        ),
        click.option(
            "--run",
            "run_command",
            metavar="CMD",
            help="Run CMD with a minimal init in place of the image's own; the guest ends with it.",
        ),
        click.option(
            "--ready",
            metavar="CMD",
            help="The guest is ready once CMD, run in it by a shell, exits 0. "
            "Default: systemd is up; else the guest agent answers.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(1),
            default=300,
            show_default=True,
            metavar="SECONDS",
            help="How long booting and getting ready may take.",
        ),
        click.option("--no-network", is_flag=True, help="Leave the network card out."),
        click.option("--kernel", type=click.Path(path_type=Path), help="Boot this kernel image."),
        click.option(
            "--modules",
            type=click.Path(path_type=Path),
            help="With --kernel: its folder lib/modules/RELEASE.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def accel_option(command: _F) -> _F:
    """--accel."""
    return click.option(
        "--accel",
        type=click.Choice(["auto", "kvm", "tcg"]),
        default="auto",
        show_default=True,
        help="auto: KVM if a probe guest really runs under it, else TCG.",
    )(command)
