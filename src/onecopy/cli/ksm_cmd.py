"""onecopy ksm"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from onecopy.cli.output import print_json, print_line, print_table
from onecopy.cli.params import GuestType, SecondsType, json_option
from onecopy.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from onecopy.guest.runtime import Runtime
    from onecopy.sharing.ksm_settings import Status


def _settings(function: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option(
            "--pages", type=click.IntRange(1, 1 << 31), help="Pages to look at before each sleep."
        ),
        click.option(
            "--sleep", type=click.IntRange(0, 1 << 31), help="Milliseconds of each sleep."
        ),
        click.option(
            "--advisor/--no-advisor",
            default=None,
            help="Let the kernel choose --pages, within a share of a processor (Linux 6.8).",
        ),
        click.option(
            "--smart/--no-smart",
            default=None,
            help="Look less often at pages that were never merged (Linux 6.7).",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group("ksm", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Show what KSM merges, turn it on, tune it, and put all back as it was found.

    Its settings are the whole host's. Without a subcommand: status.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(_status)


@command.command("status")
@click.option(
    "--gain",
    is_flag=True,
    help="Say what it would still gain, too: reads the memory of all guests, as `advise` does.",
)
@json_option
def _status(gain: bool = False, as_json: bool = False) -> None:
    """Show KSM's settings, what it has merged, and what that costs. JSON: docs/json.md."""
    import msgspec

    from onecopy.guest.runtime import Runtime
    from onecopy.sharing import ksm_settings

    host = Runtime.open()
    found = ksm_settings.status(
        (each.name, each.pid) for each in [*host.guests(), *host.prepared()]
    )
    more = _gain(host) if gain else None
    if as_json:
        print_json(msgspec.to_builtins(found) | {"gain": more})
        return
    _print(found)
    if gain:
        print(f"\nIt would still gain {_mib(more)} of guests' RAM, at most.")


def _gain(host: Runtime) -> int:
    from onecopy.cli.output import progress
    from onecopy.guest.observe import advise

    with progress() as tell:
        ways = advise.look(host, tell=tell).survey.advice.ways
    return next(way.saves for way in ways if way.name == "ksm")


@command.command("on")
@_settings
def _on(pages: int | None, sleep: int | None, advisor: bool | None, smart: bool | None) -> None:
    """Let KSM run; what it finds set is noted, and `ksm off` puts it back.

    Without options the kernel's advisor is turned on where there is one; all else stays as it is.
    """
    from onecopy.linux.counters import ksm
    from onecopy.sharing import ksm_settings

    if pages is None and advisor is None and ksm.setting("advisor_mode"):
        advisor = True
    ksm_settings.turn_on(_values(pages, sleep, advisor, smart))
    print("KSM runs; `onecopy ksm off` puts the host's settings back")


@command.command("tune")
@_settings
def _tune(pages: int | None, sleep: int | None, advisor: bool | None, smart: bool | None) -> None:
    """Change how fast KSM looks at memory."""
    from onecopy.sharing import ksm_settings

    values = _values(pages, sleep, advisor, smart)
    if not values:
        raise InvalidInput("nothing to change", hint="give one of the options, as --pages 1000")
    ksm_settings.tune(values)


@command.command("auto")
@click.option(
    "--below",
    type=click.IntRange(1, 100),
    default=20,
    show_default=True,
    help="KSM runs while less than this percentage of the host's memory is available.",
)
@click.option(
    "--interval",
    type=SecondsType(0.1),
    default=60.0,
    show_default=True,
    help="Seconds between two looks.",
)
def _auto(below: int, interval: float) -> None:
    """Let KSM run while memory is scarce and it gains something, until this is ended.

    It rests while whole scans bring no profit. At the end all is as it was found; after a crash
    `ksm status` shows what is changed, and `ksm off` puts it back.
    """
    from onecopy.guest.observe import ksm_auto

    ksm_auto.run(interval, below / 100, lambda text: print_line(f"onecopy: {text}", sys.stdout))


@command.command("open")
@click.argument("guests", nargs=-1, required=True, type=GuestType())
def _opened(guests: tuple[str, ...]) -> None:
    """Offer the RAM of running guests to KSM; it is, unless the guest is of a trust domain."""
    _set(guests, mergeable=True)


@command.command("close")
@click.argument("guests", nargs=-1, required=True, type=GuestType())
def _closed(guests: tuple[str, ...]) -> None:
    """Keep KSM from the RAM of running guests; what is merged of it is torn apart."""
    _set(guests, mergeable=False)


def _set(guests: tuple[str, ...], *, mergeable: bool) -> None:
    import asyncio

    from onecopy.guest.observe.ksm_guest import set_mergeable
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    for guest in guests:
        asyncio.run(set_mergeable(host, guest, mergeable=mergeable))


@command.command("off")
@click.option(
    "--unmerge",
    is_flag=True,
    help="Tear merged pages apart, too, which takes the memory that was saved.",
)
def _off(unmerge: bool) -> None:
    """Put KSM's settings back as onecopy found them."""
    from onecopy.sharing import ksm_settings

    others = ksm_settings.turn_off(unmerge=unmerge)
    for name in others:
        print(f"{name} was changed by somebody else meanwhile, and is left")
    print(f"KSM's {'other ' if others else ''}settings are as they were found")


def _values(
    pages: int | None, sleep: int | None, advisor: bool | None, smart: bool | None
) -> dict[str, str]:
    """The kernel's names, in the order in which it takes them."""
    if pages is not None and advisor:
        raise InvalidInput("--pages and --advisor exclude each other", hint="leave one out")
    if pages is not None and advisor is None:
        from onecopy.linux.counters import ksm

        # With its advisor the kernel takes no number of pages.
        advisor = False if ksm.setting("advisor_mode") else None
    values = {}
    if advisor is not None:
        values["advisor_mode"] = "scan-time" if advisor else "none"
    if pages is not None:
        values["pages_to_scan"] = str(pages)
    if sleep is not None:
        values["sleep_millisecs"] = str(sleep)
    if smart is not None:
        values["smart_scan"] = str(int(smart))
    return values


_RUNS = {0: "stopped; merged pages stay", 1: "running", 2: "stopped; all pages torn apart"}


def _print(found: Status) -> None:
    advisor = found.advisor_mode == "scan-time"
    rows = [
        ["state", "?" if found.run is None else _RUNS[found.run]],
        ["pages to scan", f"{_text(found.pages_to_scan)}{' (its advisor)' if advisor else ''}"],
        ["sleep", f"{_text(found.sleep_millisecs)} ms"],
        ["merged pages", f"{_mib(found.shared)} kept, which save {_mib(found.saved)}"],
        ["profit", f"{_mib(found.profit)}: saved, less KSM's own records"],
        ["not merged", f"{_mib(found.unshared)} unlike, {_mib(found.volatile)} changing too fast"],
        ["whole scans", _text(found.full_scans)],
        ["CPU", "?" if found.cpu_seconds is None else f"{found.cpu_seconds:.2f} s of ksmd"],
        ["to unmerge", f"{_mib(found.unmerge)} of memory (ksm off --unmerge)"],
    ]
    if found.run == 0 and found.saved:
        rows.append(["these figures", "of when it last ran: what has ended since is still in them"])
    for name, each in found.changed.items():
        rows.append(["changed", f"{name}: {each.found} when found, {each.set or 'its advisor'}"])
    print_table(["KSM", ""], rows)
    print()
    print_table(
        ["GUEST", "MERGED", "PROFIT", "QEMU'S OWN"],
        [
            [each.name, _mib(each.merged), _mib(each.profit), _open(each.merge_any)]
            for each in found.guests
        ],
    )


def _open(merge_any: bool | None) -> str:
    return "?" if merge_any is None else "open" if merge_any else "closed"


def _text(number: int | None) -> str:
    return "?" if number is None else str(number)


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.2f} MiB"
