"""Parameter types and options that several commands share; names complete from the store."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from onecopy.errors import InvalidInput
from onecopy.model import Reference, check_name, check_ports, parse_mount, parse_size

if TYPE_CHECKING:
    from onecopy.guest.lifecycle.disks import DiskSpec
    from onecopy.store import Access

_F = TypeVar("_F", bound=Callable[..., Any])


class ReferenceType(click.ParamType[Any]):
    """A segment, saved system or kernel (of ``kind``); with ``guests`` also a guest's name."""

    name = "reference"

    def __init__(self, kind: str | None = None, *, guests: bool = False) -> None:
        self._kind = kind
        self._guests = guests

    def convert(self, value: Any, param: object, ctx: object) -> Reference:
        return value if isinstance(value, Reference) else Reference.parse(value)

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        from onecopy.store import Store

        found = [artifact.ref for artifact in Store().artifacts(self._kind)]
        if self._guests:
            from onecopy.guest.runtime import Runtime

            host = Runtime.open()
            found += [guest.name for guest in host.guests() + host.ended()]
        return [CompletionItem(name) for name in found if name.startswith(incomplete)]


class GuestType(click.ParamType[Any]):
    """A running guest, or with ``ended`` also one that has ended."""

    name = "guest"

    def __init__(self, *, ended: bool = False) -> None:
        self._ended = ended

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        from onecopy.guest.runtime import Runtime

        host = Runtime.open()
        guests = host.guests() + (host.ended() if self._ended else [])
        return [CompletionItem(g.name) for g in guests if g.name.startswith(incomplete)]


class SizeType(click.ParamType[Any]):
    """Bytes: 256M, 1G."""

    name = "size"

    def convert(self, value: Any, param: object, ctx: object) -> int:
        return value if isinstance(value, int) else parse_size(value)


class SecondsType(click.FloatRange):
    """A finite time of ``least`` seconds or more: at most a year, which any clock can count."""

    def __init__(self, least: float) -> None:
        super().__init__(least, 366 * 86400)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = float(super().convert(value, param, ctx))
        # It is neither above nor below anything, and so in any range.
        if math.isnan(found):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return found


class PublishType(click.ParamType[Any]):
    """[HOST:]GUEST ports."""

    name = "[host:]guest"

    def convert(self, value: Any, param: object, ctx: object) -> tuple[int, int]:
        host, _, guest = str(value).rpartition(":")
        # int() takes more digits than these, and isdigit() more than int().
        if not re.fullmatch("[0-9]{1,5}", guest) or not re.fullmatch("[0-9]{0,5}", host):
            raise InvalidInput(f"{value!r} is not a port pair", hint="write for example -p 8080:80")
        return check_ports(int(host or 0), int(guest))


class NameType(click.ParamType[Any]):
    """The name of segments or saved systems, all versions."""

    name = "name"

    def convert(self, value: Any, param: object, ctx: object) -> str:
        return check_name(str(value))

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        from onecopy.store import Store

        names = sorted({artifact.name for artifact in Store().artifacts()})
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class AttachType(click.ParamType[Any]):
    """SEGMENT, or SEGMENT:/MOUNTPOINT."""

    name = "segment[:/mountpoint]"

    def convert(self, value: Any, param: object, ctx: object) -> tuple[Reference, str]:
        return parse_mount(str(value))


class DiskType(click.ParamType[Any]):
    """SIZE or FILE, and where to mount it."""

    name = "size|file[:/mountpoint]"

    def convert(self, value: Any, param: object, ctx: object) -> DiskSpec:
        from onecopy.guest.lifecycle.disks import DiskSpec

        return DiskSpec.parse(str(value))


class HookType(click.ParamType[Any]):
    """A clone hook."""

    name = "hook"

    def convert(self, value: Any, param: object, ctx: object) -> str:
        from onecopy.guest.lifecycle.clone_hooks import check_hook

        return check_hook(str(value))

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        from onecopy.images.tools import ready_hooks

        return [CompletionItem(each) for each in ready_hooks() if each.startswith(incomplete)]


domain_option = click.option(
    "--domain",
    metavar="NAME",
    help="Trust domain of a new name; - is the default one. Guests share nothing across domains.",
)


def domain_of(text: str | None) -> str | None:
    """The trust domain that a user typed; None if none was."""
    from onecopy.store.access import check_domain

    return None if text is None else "" if text == "-" else check_domain(text)


def new_access(domain: str | None) -> Access | None:
    """Who may load a new name in a trust domain; None if none was typed."""
    from onecopy.store import Access

    found = domain_of(domain)
    return None if found is None else Access(domain=found)


def print_access(name: str, access: Access) -> None:
    """Say who may load a name."""
    from onecopy.store.access import describe_domain

    if access.restricted:
        print(f"{name} is restricted to {', '.join(access.grants) or 'nobody'}")
    else:
        print(f"{name} is for all guests of {describe_domain(access.domain)}")


def typed_options() -> dict[str, str]:
    """Parameter -> option, of those that the user has typed."""
    context = click.get_current_context()
    return {
        each.name: each.opts[0]
        for each in context.command.params
        if each.name and context.get_parameter_source(each.name) is ParameterSource.COMMANDLINE
    }


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def cold_options(command: _F) -> _F:
    """The options of what boots a guest: `save` and `run --cold`."""
    options = (
        click.option(
            "--segment",
            "segments",
            multiple=True,
            type=AttachType(),
            metavar="SEGMENT[:/MOUNTPOINT]",
            help="Map a further segment: mounted there, or as /dev/onecopy/NAME. May be repeated.",
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
            type=SecondsType(1),
            default=300,
            show_default=True,
            metavar="SECONDS",
            help="How long booting and getting ready may take.",
        ),
        click.option("--no-network", is_flag=True, help="Leave the network card out."),
        click.option(
            "--allow-host",
            is_flag=True,
            help="Let the guest reach what listens on this host: its 127.0.0.1 as 198.18.0.2, its "
            "other addresses, link-local ones, and other guests' published ports. Without it a "
            "guest reaches the outside only.",
        ),
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
