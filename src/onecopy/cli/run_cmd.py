"""onecopy run"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import progress
from onecopy.cli.params import ReferenceType, program_argument
from onecopy.cli.start_options import (
    BOOT,
    START,
    CloneOptions,
    Ports,
    StartOptions,
    clone_options,
    start_options,
)
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.cli.starting import Starter
    from onecopy.guest.run_directory import Batch, GuestRecord
    from onecopy.guest.runtime import Runtime


@click.command(
    "run",
    cls=Command,
    examples=[
        ("onecopy run --count 4 --name web --publish 8080:80 hello", "Start web-1 to web-4."),
        ("onecopy run hello python3 --version", "Start a clone for one command."),
    ],
    option_groups={START: "Start options", BOOT: "Guest options"},
)
@click.argument("system", type=ReferenceType("system"))
@program_argument()
@start_options
@clone_options
def command(
    system: Reference, program: tuple[str, ...], start: StartOptions, clone: CloneOptions
) -> int:
    """Start guests from a saved system.

    With CMD, run it in each guest, stop the guests when it has ended, and exit with its exit code.
    Options of onecopy stand before SYSTEM. The start fails if a guest cannot get what an option
    requests.
    """
    from onecopy.cli import starting
    from onecopy.guest.runtime import Runtime

    with progress() as tell:
        starting.check(system.name, start, tell)
        host = Runtime.open()
        starter = _starter(host, system, start, clone, needs_agent=bool(program))
        return starting.start_guests(host, system.name, starter, start, program, tell)


def _starter(
    host: Runtime, system: Reference, start: StartOptions, clone: CloneOptions, *, needs_agent: bool
) -> Starter:
    from onecopy.cli.starting import Starter
    from onecopy.guest.lifecycle import admission, restore
    from onecopy.guest.lifecycle.resources import ExtraResources, added_memory
    from onecopy.guest.run_directory import no_agent
    from onecopy.vmm.accel import Choice

    extra = ExtraResources(
        memory=clone.memory, cpus=clone.cpus, segments=clone.segments, disks=start.disks
    )
    template = restore.template(host, host.store.resolve(system, "system"), Choice(clone.accel))
    if needs_agent and not template.config.agent:
        raise no_agent(str(system))
    added = added_memory(extra, template.config)
    need = admission.of_clones(template.accel.name, start.number, added)

    def spec(ports: Ports) -> restore.CloneSpec:
        return restore.CloneSpec(
            ports, start.bridge, start.ksm, extra, clone.allow_host, need.translated
        )

    def begin(name: str, ports: Ports, batch: Batch) -> Awaitable[GuestRecord]:
        return restore.start_clone(host, template, name, spec(ports), batch)

    return Starter(
        need, lambda name, ports: restore.dry_run(host, template, name, spec(ports)), begin
    )
