"""onecopy run"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from onecopy.cli import signals
from onecopy.cli.cold import boot_spec
from onecopy.cli.output import duration, print_json, print_line, progress, tell_error
from onecopy.cli.params import (
    DiskType,
    PublishType,
    ReferenceType,
    accel_option,
    cold_options,
    json_option,
    typed_options,
)
from onecopy.errors import InvalidInput
from onecopy.model import Mergeable, Reference

if TYPE_CHECKING:
    from onecopy.errors import OnecopyError
    from onecopy.guest.lifecycle.batch import Started
    from onecopy.guest.lifecycle.disks import DiskSpec
    from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec
    from onecopy.guest.run_directory import GuestRecord
    from onecopy.guest.runtime import Runtime

Ports = tuple[tuple[int, int], ...]
_COLD_ONLY = ("cpu", "run_command", "ready", "timeout", "no_network", "kernel", "modules")


@click.command("run")
@click.argument("source", type=ReferenceType())
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@click.option("-n", "--count", type=click.IntRange(1, 10000), default=1, help="Start N guests.")
@click.option("--name", help="The guest's name and hostname; NAME-1, NAME-2... for several.")
@click.option(
    "-p",
    "--publish",
    multiple=True,
    type=PublishType(),
    help="Forward a port of 127.0.0.1 to the guest; any free one without HOST or with 0. "
    "Guest number i of several gets HOST + i - 1.",
)
@click.option(
    "--bridge",
    default="",
    metavar="NAME",
    help="Make the guest a port of this bridge of the host's, by a tap device; it asks for an "
    "address there (DHCP). Root only.",
)
@click.option(
    "--cold", is_flag=True, help="SOURCE is a root segment, or a kernel by itself: boot it."
)
@click.option("--keep-going", is_flag=True, help="If a guest cannot start, keep the others.")
@click.option("--keep", is_flag=True, help="With CMD: do not stop the guests when it has ended.")
@click.option(
    "--ksm",
    type=click.Choice(["none", "ram", "all"]),
    default="ram",
    help="What KSM may merge while it runs (`onecopy ksm`): nothing of the guest, its RAM, or also "
    "what QEMU itself keeps in memory, which then goes without address randomisation (Linux 6.4).",
)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    type=DiskType(),
    metavar="SIZE|FILE[:/MOUNTPOINT]",
    help="A disk whose content stays: the guest's own, found again by --name, or an image (qcow2, "
    "raw). Mounted there (ext4), or as /dev/onecopy/disk0. May be repeated.",
)
@click.option(
    "--overcommit",
    is_flag=True,
    help="Start the guests even if the host may not have the memory for all of them.",
)
@cold_options
@accel_option
@click.option("--dry-run", is_flag=True, help="Print QEMU's command line and do nothing.")
@json_option
def command(
    source: Reference,
    cmd: tuple[str, ...],
    count: int,
    name: str | None,
    publish: Ports,
    bridge: str,
    cold: bool,
    keep_going: bool,
    keep: bool,
    ksm: str,
    disks: tuple[DiskSpec, ...],
    overcommit: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Start guests from a saved system, or boot them cold.

    From a saved system --memory and --cpus give more than was saved, and --segment loads further
    segments; what cannot be had ends the start.

    With CMD (after --), run it in each guest, stop the guests when it has ended, and exit with its
    exit code.
    """
    from msgspec.structs import replace

    from onecopy.guest.lifecycle import start
    from onecopy.guest.runtime import Runtime

    options |= {"publish": publish, "ksm": ksm, "bridge": bridge, "disks": disks}
    if cold:
        # What is run in it by `exec` is a reason to be up.
        spec: BootSpec | CloneSpec = replace(boot_spec(source, **options), idle=bool(cmd))
    else:
        spec = _clone_spec(source, options)
    request = start.Request(
        spec, count, name, keep_going=keep_going, overcommit=overcommit, needs_agent=bool(cmd)
    )
    host = Runtime.open()
    with progress() as tell:
        if ksm == "all":
            _tell_of_ksm(tell)
        group = start.plan(host, request, tell)
        if not dry_run:
            begun = start.start(host, group)
            return _started(_finished(host, begun, cmd, keep), as_json, bool(cmd))
    for argv in start.dry_run(host, group):
        print(shlex.join(argv))
    return _failed(group.refused)


def _clone_spec(source: Reference, options: dict[str, Any]) -> CloneSpec:
    from onecopy.guest.lifecycle.launchplan import CloneSpec
    from onecopy.vmm.accel import Choice

    typed = typed_options()
    saved = [typed[key] for key in _COLD_ONLY if key in typed]
    if saved:
        raise InvalidInput(
            f"{saved[0]} is part of a saved system and cannot be changed",
            hint="give it to `onecopy save`, or boot a segment with --cold",
        )
    return CloneSpec(
        system=source,
        memory=options["memory"] if "memory" in typed else None,
        cpus=options["cpus"] if "cpus" in typed else None,
        segments=options["segments"],
        disks=options["disks"],
        publish=options["publish"],
        bridge=options["bridge"],
        allow_host=options["allow_host"],
        ksm=Mergeable(options["ksm"]),
        accel=Choice(options["accel"]),
    )


def _tell_of_ksm(tell: Callable[[str], None]) -> None:
    from onecopy.linux.counters import ksm

    state = ksm.read()
    if state and state.run != 1:
        tell("KSM does not run, so nothing is merged yet (root: `onecopy ksm on`)")


def _finished(
    host: Runtime, start: Awaitable[Started], cmd: Sequence[str], keep: bool
) -> tuple[Started, int]:
    """As _then(); interrupted, even if all run by then, it leaves no guest that nobody knows of."""
    from onecopy.guest.lifecycle.batch import undo

    untold: list[GuestRecord] = []
    try:
        result = asyncio.run(_then(host, start, cmd, keep, untold))
        signals.ignore()
    except BaseException:
        undo(host, untold)
        raise
    return result


async def _then(
    host: Runtime,
    start: Awaitable[Started],
    cmd: Sequence[str],
    keep: bool,
    untold: list[GuestRecord],
) -> tuple[Started, int]:
    """Start, then run ``cmd`` in each guest; returns the first exit code that is not 0.

    Without a command ``untold`` gets the guests, in the same step in which they are handed out.
    """
    from onecopy.guest.exec import run_streaming
    from onecopy.guest.exec_streams import Streams, to_file
    from onecopy.guest.lifecycle.stop import sync_disks

    started = await start
    if not cmd:
        untold += started.guests
        return started, 0
    sys.stdout.flush()
    passed = Streams(to_file(1), to_file(2))
    try:
        codes = await asyncio.gather(
            *(run_streaming(host.run / guest.name, cmd, passed) for guest in started.guests)
        )
    finally:
        if not keep:
            await asyncio.gather(*(sync_disks(host, guest) for guest in started.guests))
            host.end(*started.guests)
    return started, next((code for code in codes if code), 0)


def _started(result: tuple[Started, int], as_json: bool, quiet: bool) -> int:
    import msgspec

    started, code = result
    if as_json:
        failures = [
            {"name": name, "error": error.id, "message": error.message}
            for name, error in started.failures
        ]
        print_json({"guests": msgspec.to_builtins(started.guests), "failures": failures})
    elif not quiet:
        for guest in started.guests:
            ports = "".join(f" 127.0.0.1:{host}->{port}" for host, port in guest.publish)
            how = f"started in {duration(guest.start_seconds)} under {guest.accel}"
            print_line(f"{guest.name} {how} ({guest.accel_reason}){ports}")
    return code or _failed(started.failures)


def _failed(failures: Sequence[tuple[str, OnecopyError]]) -> int:
    """Tell of guests that did not start, or would not; the exit code."""
    for name, error in failures:
        tell_error(error, f"{name} did not start: ")
    return failures[0][1].exit_code if failures else 0
