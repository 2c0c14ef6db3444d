"""onecopy ksm"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command, Group
from onecopy.cli.output import print_json, print_line
from onecopy.cli.params import GuestType, SecondsType, json_option
from onecopy.cli.tables import print_table
from onecopy.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from onecopy.guest.runtime import Runtime
    from onecopy.sharing.ksm_settings import Status


def _settings(function: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option(
            "--pages",
            type=click.IntRange(1, 1 << 31),
            metavar="N",
            help="Pages that KSM scans before each sleep. Turns the advisor off.",
        ),
        click.option(
            "--sleep",
            type=click.IntRange(0, 1 << 31),
            metavar="MS",
            help="Time that KSM sleeps between scans, in milliseconds.",
        ),
        click.option(
            "--advisor/--no-advisor",
            default=None,
            help="Let the kernel choose --pages within a CPU limit (needs Linux 6.8).",
        ),
        click.option(
            "--smart/--no-smart",
            default=None,
            help="Scan pages that were never merged less often (needs Linux 6.7).",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group(
    "ksm",
    cls=Group,
    invoke_without_command=True,
    examples=[
        ("onecopy ksm", "Show what KSM merges and costs."),
        ("onecopy ksm auto --threshold 25", "Run KSM while less than 25 % of memory is available."),
    ],
)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Control KSM, the kernel's merging of equal pages.

    KSM's settings belong to the whole host. onecopy records the values that it finds, and `onecopy
    ksm off` restores them. Without a subcommand the command shows the status.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(_status)


@command.command(
    "status",
    cls=Command,
    examples=[
        ("onecopy ksm status", "Show settings, merged memory and cost."),
        ("onecopy ksm status --gain", "Estimate what KSM could still merge."),
    ],
)
@click.option(
    "--gain",
    is_flag=True,
    help="Also estimate the memory that KSM could still save. Reads the memory of all guests.",
)
@json_option
def _status(gain: bool = False, as_json: bool = False) -> None:
    """Show KSM's settings, merged memory and cost.

    docs/json.md has the fields of --json.
    """
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
        print(f"\nKSM could still save up to {_mib(more)} of guests' RAM.")


def _gain(host: Runtime) -> int:
    from onecopy.cli.output import progress
    from onecopy.guest.observe import advise

    with progress() as tell:
        ways = advise.look(host, tell=tell).survey.advice.ways
    return next(way.saves for way in ways if way.name == "ksm")


@command.command(
    "on",
    cls=Command,
    examples=[
        ("onecopy ksm on", "Start KSM, with the kernel's advisor where it has one."),
        ("onecopy ksm on --pages 2000 --sleep 20", "Start it with settings of your own."),
    ],
)
@_settings
def _on(pages: int | None, sleep: int | None, advisor: bool | None, smart: bool | None) -> None:
    """Start KSM.

    onecopy records the settings that it finds, and `onecopy ksm off` restores them. Without options
    the kernel's advisor is turned on, if the kernel has one; other settings do not change.
    """
    from onecopy.linux.counters import ksm
    from onecopy.sharing import ksm_settings

    if pages is None and advisor is None and ksm.setting("advisor_mode"):
        advisor = True
    ksm_settings.turn_on(_values(pages, sleep, advisor, smart))
    print("KSM is running; `onecopy ksm off` restores the host's settings")


@command.command(
    "tune",
    cls=Command,
    examples=[
        ("onecopy ksm tune --pages 4000", "Scan faster."),
        ("onecopy ksm tune --smart", "Skip pages that were never merged."),
    ],
)
@_settings
def _tune(pages: int | None, sleep: int | None, advisor: bool | None, smart: bool | None) -> None:
    """Change how fast KSM scans memory."""
    from onecopy.sharing import ksm_settings

    values = _values(pages, sleep, advisor, smart)
    if not values:
        raise InvalidInput(
            "no setting to change is given", hint="give an option, for example --pages 1000"
        )
    ksm_settings.tune(values)


@command.command(
    "auto",
    cls=Command,
    examples=[
        ("onecopy ksm auto", "Run KSM while less than 20 % of memory is available."),
        ("onecopy ksm auto --threshold 40 --interval 10", "Start it earlier, and look more often."),
    ],
)
@click.option(
    "--threshold",
    type=click.IntRange(1, 100),
    default=20,
    show_default=True,
    metavar="PERCENT",
    help="Run KSM while less than this percentage of the host's memory is available.",
)
@click.option(
    "--interval",
    type=SecondsType(0.1),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two checks, in seconds.",
)
def _auto(threshold: int, interval: float) -> None:
    """Run KSM while memory is scarce and merging pays.

    The command runs until it is ended. It stops KSM while full scans save nothing. At its end it
    restores the settings that it found; after a crash, `onecopy ksm off` restores them.
    """
    from onecopy.guest.observe import ksm_auto

    ksm_auto.run(interval, threshold / 100, lambda text: print_line(f"onecopy: {text}", sys.stdout))


@command.command(
    "allow",
    cls=Command,
    examples=[
        ("onecopy ksm allow web-1 web-2", "Let KSM merge the RAM of two guests."),
        ("onecopy ksm status", "Show what it has merged."),
    ],
)
@click.argument("guests", nargs=-1, required=True, type=GuestType())
def _allow(guests: tuple[str, ...]) -> None:
    """Allow KSM to merge the RAM of running guests.

    That is the default, except for guests of a trust domain.
    """
    _set(guests, mergeable=True)


@command.command(
    "deny",
    cls=Command,
    examples=[
        ("onecopy ksm deny db", "Keep the RAM of the guest db from being merged."),
        ("onecopy ksm allow db", "Allow it again."),
    ],
)
@click.argument("guests", nargs=-1, required=True, type=GuestType())
def _deny(guests: tuple[str, ...]) -> None:
    """Forbid KSM to merge the RAM of running guests.

    The kernel separates pages that are merged already.
    """
    _set(guests, mergeable=False)


def _set(guests: tuple[str, ...], *, mergeable: bool) -> None:
    from onecopy.cli.event_loop import asyncio
    from onecopy.guest.observe.ksm_guest import set_mergeable
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    for guest in guests:
        asyncio.run(set_mergeable(host, guest, mergeable=mergeable))


@command.command(
    "off",
    cls=Command,
    examples=[
        ("onecopy ksm off", "Restore KSM's settings."),
        ("onecopy ksm off --unmerge", "Also separate all merged pages."),
    ],
)
@click.option(
    "--unmerge",
    is_flag=True,
    help="Also separate merged pages, which takes back the memory that they saved.",
)
def _off(unmerge: bool) -> None:
    """Restore the KSM settings that onecopy found."""
    from onecopy.sharing import ksm_settings

    others = ksm_settings.turn_off(unmerge=unmerge)
    for name in others:
        print(f"{name} is not restored: another program has changed it")
    print(f"KSM's {'other ' if others else ''}settings are restored")


def _values(
    pages: int | None, sleep: int | None, advisor: bool | None, smart: bool | None
) -> dict[str, str]:
    """Return setting -> value with the kernel's names, in the order that the kernel requires."""
    if pages is not None and advisor:
        raise InvalidInput("--pages and --advisor exclude each other", hint="leave one out")
    if pages is not None and advisor is None:
        from onecopy.linux.counters import ksm

        # While its advisor is on, the kernel rejects a number of pages.
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


_RUNS = {0: "stopped; merged pages stay", 1: "running", 2: "stopped; all pages separated"}


def _print(found: Status) -> None:
    advisor = found.advisor_mode == "scan-time"
    rows = [
        ["state", "?" if found.run is None else _RUNS[found.run]],
        ["pages to scan", f"{_text(found.pages_to_scan)}{' (its advisor)' if advisor else ''}"],
        ["sleep", f"{_text(found.sleep_millisecs)} ms"],
        ["merged pages", f"{_mib(found.shared)} used, {_mib(found.saved)} saved"],
        ["profit", f"{_mib(found.profit)} (saved, less KSM's own memory)"],
        ["not merged", f"{_mib(found.unshared)} unique, {_mib(found.volatile)} changing too fast"],
        ["full scans", _text(found.full_scans)],
        ["CPU", "?" if found.cpu_seconds is None else f"{found.cpu_seconds:.2f} s used by ksmd"],
        ["to unmerge", f"takes up to {_mib(found.unmerge)} (`onecopy ksm off --unmerge`)"],
    ]
    if found.run == 0 and found.saved:
        rows.append(["note", "KSM is stopped: the figures still count guests that have ended"])
    for name, each in found.changed.items():
        rows.append(
            ["changed", f"{name}: {each.found} before, now {each.set or 'chosen by the advisor'}"]
        )
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
    return "?" if merge_any is None else "allowed" if merge_any else "denied"


def _text(number: int | None) -> str:
    return "?" if number is None else str(number)


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.2f} MiB"
