"""onecopy plan"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onecopy.cli.output import duration, print_json, print_table, progress
from onecopy.cli.params import ReferenceType, SizeType, json_option
from onecopy.errors import InvalidInput
from onecopy.model import Reference, format_size

if TYPE_CHECKING:
    from onecopy.sharing.forecast import Forecast, Profile


@click.command("plan")
@click.option(
    "--guests", type=click.IntRange(1, 1_000_000), required=True, help="How many there will be."
)
@click.option(
    "--system", type=ReferenceType("system"), required=True, help="From which they start."
)
@click.option("--hosts", type=click.IntRange(1, 1_000_000), help="Hosts that they are spread over.")
@click.option("--memory", type=SizeType(), help="Memory that each host has for them.")
@click.option(
    "--cpus", type=click.IntRange(1, 8192), help="Processors of each host; default: as here."
)
@click.option(
    "--work",
    default="",
    help="Shell command of this host, run for each measured clone: its name is $GUEST.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the guests that --work reaches at 127.0.0.1:$PORT.",
)
@click.option("--measure", is_flag=True, help="Measure anew what was measured before.")
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
    """Say how much memory and time many clones of a saved system will take.

    Without --hosts: as many hosts as the memory asks for, or one. A few clones are started and
    measured the first time, which takes about a minute; other programs should be at rest then. With
    --work they first do some of what guests are for, as with `curl -s http://127.0.0.1:$PORT/` or
    `onecopy exec $GUEST -- CMD`.
    """
    import asyncio

    import msgspec

    from onecopy.guest.observe import plan
    from onecopy.guest.runtime import Runtime
    from onecopy.sharing.forecast import Work, forecast

    if port and not work:
        raise InvalidInput("--port is for --work", hint="leave it out, or say what is to be done")
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
    fits = {None: "", True: ", which it has", False: ": more than it has"}[found.fits]
    time = (
        "never: its processors are busy with those that run already"
        if found.seconds is None
        else duration(found.seconds)
    )
    rows = [
        ["guests", f"{found.guests} of {profile.system}"],
        ["hosts", f"{found.hosts}, with up to {found.per_host} guests each"],
        ["memory of a host", f"{format_size(found.memory)}{fits}"],
        ["- once for all", format_size(found.shared)],
        ["- for each guest", format_size(profile.each)],
        ["until all are handed out", time],
        ["processors, at rest", f"{found.busy:.0%} busy"],
    ]
    print_table(["PLAN", ""], rows)
    work = profile.work.command
    done = f"after {work!r}" if work else "left alone"
    print(
        f"\nMeasured here with {profile.clones} clones {done} ({profile.accel}, QEMU "
        f"{profile.qemu}, {profile.processors} processors): what guests do later costs more."
    )
