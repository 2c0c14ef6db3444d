"""onecopy run"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onecopy.cli.cold import cold_spec
from onecopy.cli.output import duration, print_json, progress
from onecopy.cli.params import (
    PublishType,
    ReferenceType,
    accel_option,
    cold_options,
    json_option,
)
from onecopy.errors import InvalidInput
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.guest.folder import Batch, GuestRecord
    from onecopy.guest.host import Host
    from onecopy.guest.many import Started

Ports = tuple[tuple[int, int], ...]
_COLD_ONLY = (
    *("segments", "memory", "cpus", "cpu", "run_command", "ready", "timeout"),
    *("no_network", "kernel", "modules"),
)


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
@click.option("--cold", is_flag=True, help="SOURCE is a root segment: boot it.")
@click.option("--keep-going", is_flag=True, help="If a guest cannot start, keep the others.")
@click.option("--keep", is_flag=True, help="With CMD: do not stop the guests when it has ended.")
@click.option(
    "--merge-vmm",
    is_flag=True,
    help="Let KSM merge what QEMU itself keeps in memory, too; QEMU then goes without address "
    "randomisation. Needs Linux 6.4, and KSM to run.",
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
    cold: bool,
    keep_going: bool,
    keep: bool,
    merge_vmm: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Start guests from a saved system, or boot them cold.

    With CMD (after --), run it in each guest, stop the guests when it has ended, and exit with its
    exit code.
    """
    from onecopy.guest import many
    from onecopy.guest.host import Host

    host = Host.open()
    names = many.names_for(source.name, name, count)
    with progress() as tell:
        if merge_vmm:
            _tell_of_ksm(tell)
        options["merge"] = merge_vmm
        starter = _cold(host, source, options, tell) if cold else _clone(host, source, options)
        if dry_run:
            argv = [
                starter(each, _ports(publish, number)).argv for number, each in enumerate(names)
            ]
        else:
            ports = {each: _ports(publish, number) for number, each in enumerate(names)}
            start = many.start_many(
                host,
                names,
                lambda each, batch: starter(each, ports[each]).start(batch),
                keep_going=keep_going,
            )
            return _started(asyncio.run(_then(host, start, cmd, keep)), as_json, bool(cmd))
    for line in argv:
        print(shlex.join(line))
    return 0


class _Start:
    """One guest to be: its command line, or itself."""

    def __init__(self, argv: list[str], start: Callable[[Batch], Awaitable[GuestRecord]]) -> None:
        self.argv = argv
        self.start = start


def _clone(
    host: Host, source: Reference, options: dict[str, Any]
) -> Callable[[str, Ports], _Start]:
    from onecopy.guest import start
    from onecopy.vmm.accel import Choice

    typed = click.get_current_context().get_parameter_source
    given = [key for key in _COLD_ONLY if typed(key) is ParameterSource.COMMANDLINE]
    if given:
        option = {"segments": "segment", "run_command": "run"}.get(given[0], given[0])
        raise InvalidInput(
            f"--{option.replace('_', '-')} is part of a saved system and cannot be changed",
            hint="give it to `onecopy save`, or boot a segment with --cold",
        )
    template = start.template(host, host.store.resolve(source, "system"), Choice(options["accel"]))
    return lambda name, ports: _Start(
        start.dry_run(host, template, name, ports),
        lambda batch: start.start_clone(host, template, name, ports, batch, merge=options["merge"]),
    )


def _cold(
    host: Host, source: Reference, options: dict[str, Any], tell: Callable[[str], None]
) -> Callable[[str, Ports], _Start]:
    from dataclasses import replace

    from onecopy.guest import boot

    prepared = boot.prepare_cold(host, cold_spec(source, **options), tell)
    tell(f"booting under {prepared.accel.name} ({prepared.accel.reason})")

    def starter(name: str, ports: Ports) -> _Start:
        mine = replace(prepared, spec=replace(prepared.spec, publish=ports))
        return _Start(
            boot.dry_run(host, mine, name), lambda batch: boot.run_cold(host, mine, name, batch)
        )

    return starter


def _tell_of_ksm(tell: Callable[[str], None]) -> None:
    from onecopy.host import ksm

    state = ksm.read()
    if state and state.run != 1:
        tell("KSM does not run, so nothing is merged yet (root: echo 1 >/sys/kernel/mm/ksm/run)")


def _ports(publish: Ports, number: int) -> Ports:
    ports = tuple((host + number if host else 0, guest) for host, guest in publish)
    if any(host > 65535 for host, _ in ports):
        raise InvalidInput("there are not that many ports", hint="give a lower one, or 0 for any")
    return ports


async def _then(
    host: Host, start: Awaitable[Started], cmd: Sequence[str], keep: bool
) -> tuple[Started, int]:
    """Start, then run ``cmd`` in each guest; returns the first exit code that is not 0."""
    from onecopy.guest.exec import Streams, run_streaming

    started = await start
    if not cmd:
        return started, 0
    streams = Streams(_writer(sys.stdout.buffer), _writer(sys.stderr.buffer))
    try:
        codes = await asyncio.gather(
            *(run_streaming(host.run / guest.name, cmd, streams) for guest in started.guests)
        )
    finally:
        if not keep:
            for guest in started.guests:
                host.end(guest)
    return started, next((code for code in codes if code), 0)


def _writer(stream: Any) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write


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
            print(f"{guest.name} {how} ({guest.accel_reason}){ports}")
    for name, error in started.failures:
        print(f"onecopy: {name} did not start: {error.message}", file=sys.stderr)
    return code or (started.failures[0][1].exit_code if started.failures else 0)
