"""Parameter types and options that several commands share, with their completions.

Not here: the options of starts (start_options.py) and of lists (listing.py).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onecopy.cli import completion
from onecopy.errors import InvalidInput
from onecopy.model import (
    Reference,
    check_guest_name,
    check_name,
    check_ports,
    parse_mount,
    parse_size,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from onecopy.guest.lifecycle.disks import DiskSpec
    from onecopy.store import Access

    ParamType = click.ParamType[Any]
else:
    # Not generic before click 8.4.
    ParamType = click.ParamType

_F = TypeVar("_F", bound=Callable[..., Any])
_IN_GUEST = re.compile(r"([a-z0-9][a-z0-9-]*):(.*)", re.DOTALL)
_SOURCES = ("debian:bookworm", "debian:trixie", "dir:", "tar:", "disk:", "kernel:")


class ReferenceType(ParamType):
    """The type of references, with ``kind`` of one kind only, with ``guests`` also of guests."""

    name = "reference"

    def __init__(self, kind: str | None = None, *, guests: bool = False) -> None:
        self._kind = kind
        self._guests = guests

    def convert(self, value: Any, param: object, ctx: object) -> Reference:
        return value if isinstance(value, Reference) else Reference.parse(value)

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        found = completion.offered(lambda: completion.references(self._kind), incomplete)
        if self._guests:
            found += completion.offered(lambda: completion.guests(ended=True), incomplete)
        return found


class GuestType(ParamType):
    """The type of running guests' names, with ``ended`` also of ended guests."""

    name = "guest"

    def __init__(self, *, ended: bool = False) -> None:
        self._ended = ended

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        return completion.offered(lambda: completion.guests(ended=self._ended), incomplete)


class NewGuestType(ParamType):
    """The type of a new guest's name."""

    name = "name"

    def convert(self, value: Any, param: object, ctx: object) -> str:
        return check_guest_name(str(value))


class LoadedType(ParamType):
    """The type of segments that the guest in the first argument has loaded."""

    name = "segment"

    def shell_complete(
        self, ctx: click.Context, param: object, incomplete: str
    ) -> list[CompletionItem]:
        guest = ctx.params.get("guest")
        return completion.offered(lambda: completion.segments_of(guest), incomplete)


class GrantType(ParamType):
    """The type of grants: a guest's name, a pattern of names, or domain:NAME."""

    name = "grant"

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        return completion.offered(lambda: [*completion.guests(), "domain:"], incomplete)


class SizeType(ParamType):
    """The type of sizes in bytes, such as 256M or 1G."""

    name = "size"

    def convert(self, value: Any, param: object, ctx: object) -> int:
        return value if isinstance(value, int) else parse_size(value)


class SecondsType(click.FloatRange):
    """The type of times from ``least`` seconds to a year, which any clock can count."""

    def __init__(self, least: float) -> None:
        super().__init__(least, 366 * 86400)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = float(super().convert(value, param, ctx))
        # NaN compares false with both limits, so every range would accept it.
        if math.isnan(found):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return found


class PublishType(ParamType):
    """The type of published ports, [HOST:]GUEST."""

    name = "[host:]guest"

    def convert(self, value: Any, param: object, ctx: object) -> tuple[int, int]:
        host, _, guest = str(value).rpartition(":")
        # int() and isdigit() accept digits of other scripts.
        if not re.fullmatch("[0-9]{1,5}", guest) or not re.fullmatch("[0-9]{0,5}", host):
            raise InvalidInput(f"{value!r} is not a port pair", hint="write for example -p 8080:80")
        return check_ports(int(host or 0), int(guest))


class NameType(ParamType):
    """The type of names without versions."""

    name = "name"

    def convert(self, value: Any, param: object, ctx: object) -> str:
        return check_name(str(value))

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        return completion.offered(completion.names, incomplete)


class AttachType(ParamType):
    """The type of SEGMENT or SEGMENT:/MOUNTPOINT."""

    name = "segment[:/mountpoint]"

    def convert(self, value: Any, param: object, ctx: object) -> tuple[Reference, str]:
        return value if isinstance(value, tuple) else parse_mount(str(value))

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        return completion.offered(lambda: completion.references("segment"), incomplete)


class SourceType(ParamType):
    """The type of a segment's source, KIND:WHERE."""

    name = "source"

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        kind, colon, path = incomplete.partition(":")
        if colon and kind != "debian":
            return completion.offered(lambda: completion.paths(f"{kind}:", path), incomplete)
        return completion.offered(lambda: _SOURCES, incomplete)


class RangeType(ParamType):
    """The type of a new segment's range, CLASS:SIZE[:FILE]."""

    name = "class:size[:file]"

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        *before, path = incomplete.split(":", 2)
        if len(before) < 2:
            classes = ("SR:", "ER:", "SW:", "EW:", "SN:", "EN:", "SC:")
            return completion.offered(lambda: classes, incomplete)
        prefix = ":".join(before) + ":"
        return completion.offered(lambda: completion.paths(prefix, path), incomplete)


class CopyType(ParamType):
    """The type of PATH on the host or GUEST:PATH; the value is (guest or None, path)."""

    name = "[guest:]path"

    def convert(self, value: Any, param: object, ctx: object) -> tuple[str | None, str]:
        if isinstance(value, tuple):
            return value
        found = _IN_GUEST.fullmatch(str(value))
        return (found[1], found[2]) if found else (None, str(value))

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        found = completion.offered(lambda: (f"{g}:" for g in completion.guests()), incomplete)
        return [*completion.files(incomplete), *found]


class DiskType(ParamType):
    """The type of disks: SIZE or FILE, with an optional mount point."""

    name = "size|file[:/mountpoint]"

    def convert(self, value: Any, param: object, ctx: object) -> DiskSpec:
        from onecopy.guest.lifecycle.disks import DiskSpec

        return value if isinstance(value, DiskSpec) else DiskSpec.parse(str(value))

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        return completion.files(incomplete)


class OwnDiskType(ParamType):
    """The type of names of disks that guests own."""

    name = "disk"

    def shell_complete(self, ctx: object, param: object, incomplete: str) -> list[CompletionItem]:
        return completion.offered(_own_disks, incomplete)


def _own_disks() -> list[str]:
    from onecopy.guest.lifecycle.disks import list_own_disks
    from onecopy.guest.runtime import Runtime

    return [disk.name for disk in list_own_disks(Runtime.open())]


domain_option = click.option(
    "--domain",
    metavar="NAME",
    help="Trust domain of a new name; - is the default domain. Guests of different domains share "
    "no memory.",
)


def domain_of(text: str | None) -> str | None:
    """Return the typed trust domain; None without one."""
    from onecopy.store.access import check_domain

    return None if text is None else "" if text == "-" else check_domain(text)


def new_access(domain: str | None) -> Access | None:
    """Return the access of a new name in a trust domain; None without one."""
    from onecopy.store import Access

    found = domain_of(domain)
    return None if found is None else Access(domain=found)


def print_access(name: str, access: Access) -> None:
    """Print the access of a name."""
    from onecopy.store.access import describe_domain

    if access.restricted:
        print(f"{name} is restricted to {', '.join(access.grants) or 'nobody'}")
    else:
        print(f"{name} is available to all guests of {describe_domain(access.domain)}")


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def collect(
    parameter: str, kind: Callable[..., Any], options: Sequence[Callable[[Any], Any]]
) -> Callable[[_F], _F]:
    """Return a decorator that adds ``options`` to a command as one parameter.

    Args:
        parameter: The command's parameter for that value.
        kind: The NamedTuple that holds it; its fields are the parameters of the options.
        options: Results of `click.option`.
    """
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]

    def decorate(command: _F) -> _F:
        @functools.wraps(command)
        def collected(**values: Any) -> Any:
            values[parameter] = kind(**{name: values.pop(name) for name in fields})
            return command(**values)

        for option in reversed(options):
            collected = option(collected)
        return collected  # type: ignore[return-value]

    return decorate


def accel_option(
    option: Callable[..., Callable[[Any], Any]] = click.option,
    auto: str = "KVM if a probe guest runs under it, otherwise TCG",
) -> Callable[[Any], Any]:
    """Return --accel, made by ``option``; its help says what ``auto`` stands for."""
    return option(
        "--accel",
        type=click.Choice(["auto", "kvm", "tcg"]),
        default="auto",
        show_default=True,
        help=f"Accelerator. auto: {auto}.",
    )


def program_argument(*, required: bool = False) -> Callable[[_F], _F]:
    """Add the argument ``program``: a program in the guest with its arguments."""
    return click.argument(
        "program",
        nargs=-1,
        required=required,
        type=click.UNPROCESSED,
        metavar="CMD [ARG]..." if required else "[CMD [ARG]...]",
        callback=_program,
    )


def _program(
    context: click.Context, param: click.Parameter, words: tuple[str, ...]
) -> tuple[str, ...]:
    """Remove a -- before the program; reject an option in place of a program."""
    if words[:1] == ("--",):
        if param.required and not words[1:]:
            raise click.MissingParameter(ctx=context, param=param)
        return words[1:]
    if words and words[0].startswith("-"):
        usage = " ".join(context.command.collect_usage_pieces(context))
        raise InvalidInput(
            f"the option {words[0][:80]} stands where a program of the guest is expected",
            hint=f"options stand before the first argument: {context.command_path} {usage}",
        )
    return words
