"""onecopy boot"""

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
    BootOptions,
    Ports,
    StartOptions,
    boot_options,
    start_options,
)
from onecopy.model import Reference

if TYPE_CHECKING:
    from onecopy.cli.starting import Progress, Starter
    from onecopy.guest.lifecycle.bootplan import BootSpec
    from onecopy.guest.run_directory import Batch, GuestRecord
    from onecopy.guest.runtime import Runtime


@click.command(
    "boot",
    cls=Command,
    examples=[
        ("onecopy boot --name web --publish 8080:80 nginx", "Boot a root segment."),
        ("onecopy boot python python3 --version", "Boot a guest for one command."),
    ],
    option_groups={START: "Start options", BOOT: "Guest options"},
)
@click.argument("segment", type=ReferenceType())
@program_argument()
@start_options
@boot_options
def command(
    segment: Reference, program: tuple[str, ...], start: StartOptions, boot: BootOptions
) -> int:
    """Boot guests from a root segment or a bare kernel.

    With CMD, run it in each guest, stop the guests when it has ended, and exit with its exit code.
    Options of onecopy stand before SEGMENT.
    """
    from msgspec.structs import replace

    from onecopy.cli import starting
    from onecopy.guest.runtime import Runtime

    with progress() as tell:
        starting.check(segment.name, start, tell)
        host = Runtime.open()
        spec = replace(
            boot.spec(segment),
            bridge=start.bridge,
            ksm=start.ksm,
            disks=start.disks,
            # What is run in it by `exec` is a reason to be up.
            idle=bool(program),
        )
        starter = _starter(host, spec, start.number, tell)
        return starting.start_guests(host, segment.name, starter, start, program, tell)


def _starter(host: Runtime, spec: BootSpec, count: int, tell: Progress) -> Starter:
    from msgspec.structs import replace

    from onecopy.cli.starting import Starter
    from onecopy.guest.lifecycle import admission, boot, bootplan
    from onecopy.guest.run_directory import no_agent
    from onecopy.vmm.accel import in_short

    plan = bootplan.plan_boot(host, spec, tell)
    if spec.idle and not plan.agent:
        raise no_agent(str(spec.root))
    tell(f"booting under {plan.accel.name} ({in_short(plan.accel.reason)})")
    need = admission.of_cold(plan.accel.name, plan.hardware.memory, count)

    def mine(ports: Ports) -> bootplan.BootPlan:
        return replace(plan, spec=replace(plan.spec, translated=need.translated, publish=ports))

    def start(name: str, ports: Ports, batch: Batch) -> Awaitable[GuestRecord]:
        return boot.boot_guest(host, mine(ports), name, batch)

    return Starter(need, lambda name, ports: boot.dry_run(host, mine(ports), name), start)
