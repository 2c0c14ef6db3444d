"""onecopy plan"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import duration, print_json, progress
from onecopy.cli.params import ReferenceType, SizeType, json_option
from onecopy.cli.tables import print_table
from onecopy.errors import InvalidInput
from onecopy.model import Reference, format_size

if TYPE_CHECKING:
    from onecopy.sharing.forecast import Forecast, Profile


@click.command(
    "plan",
    cls=Command,
    examples=[
        ("onecopy plan --system hello --guests 400", "Estimate 400 clones on hosts like this one."),
        (
            "onecopy plan --system hello --guests 400 --port 80 "
            "--work 'curl -s http://127.0.0.1:$PORT/'",
            "Measure clones that have answered a request.",
        ),
    ],
)
@click.option(
    "--guests",
    type=click.IntRange(1, 1_000_000),
    required=True,
    metavar="N",
    help="Number of clones on all hosts together.",
)
@click.option(
    "--system",
    type=ReferenceType("system"),
    required=True,
    help="Saved system that the clones start from.",
)
@click.option(
    "--hosts",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="Number of hosts. Default: as many as --memory requires, otherwise 1.",
)
@click.option(
    "--memory",
    type=SizeType(),
    help="Memory of each host for clones, in bytes (16G). Default: no limit.",
)
@click.option(
    "--cpus",
    type=click.IntRange(1, 8192),
    metavar="N",
    help="Processors of each host. Default: those of this host.",
)
@click.option(
    "--work",
    default="",
    metavar="CMD",
    help="Run this shell command on the host for each measured clone before it is measured; "
    "$GUEST is the clone's name.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="PORT",
    help="Forward this port of each measured clone; --work reaches it at 127.0.0.1:$PORT.",
)
@click.option("--measure", is_flag=True, help="Measure again, even if an earlier result is stored.")
@json_option
def command(
    guests: int,
    system: Reference,
    hosts: int | None,
    memory: int | None,
    cpus: int | None,
    work: str,
    port: int,
    measure: bool,
    as_json: bool,
) -> None:
    """Estimate the memory and time that clones of a saved system take.

    The first time, the command starts and measures a few clones, which takes about a minute; keep
    the host otherwise idle. Without --work clones are measured as they are when they start. --work
    can run a program in the clone: `onecopy exec $GUEST CMD`.
    """
    import msgspec

    from onecopy.cli.event_loop import asyncio
    from onecopy.guest.observe import plan
    from onecopy.guest.runtime import Runtime
    from onecopy.sharing.forecast import Work, forecast

    if port and not work:
        raise InvalidInput("--port needs --work", hint="give --work CMD, or leave --port out")
    asked = Work(work, port)
    host = Runtime.open()
    artifact = host.store.resolve(system, "system")
    profile = None if measure else plan.kept(host, artifact, asked)
    if profile is None:
        with progress() as tell:
            profile = asyncio.run(plan.measure(host, artifact, tell=tell, work=asked))
        plan.keep(host, artifact, profile)
    found = forecast(profile, guests, hosts=hosts, memory=memory, processors=cpus)
    if as_json:
        print_json(msgspec.to_builtins(found) | {"profile": msgspec.to_builtins(profile)})
        return
    _print(found, profile)


def _print(found: Forecast, profile: Profile) -> None:
    fits = {None: "", True: ", available", False: ", more than it has"}[found.fits]
    time = (
        "never: idle clones already use all processors"
        if found.seconds is None
        else duration(found.seconds)
    )
    rows = [
        ["guests", f"{found.guests} of {profile.system}"],
        ["hosts", f"{found.hosts}, up to {found.per_host} guests each"],
        ["memory per host", f"{format_size(found.memory)}{fits}"],
        ["- shared by all guests", format_size(found.shared)],
        ["- per guest", format_size(profile.each)],
        ["time to start all", time],
        ["processors, guests idle", f"{found.busy:.0%} busy"],
    ]
    print_table(["PLAN", ""], rows)
    work = profile.work.command
    done = f"after {work!r}" if work else "just started"
    print(
        f"\nMeasured on this host with {profile.clones} clones {done} ({profile.accel}, QEMU "
        f"{profile.qemu}, {profile.processors} processors). Guests that work later take more."
    )
