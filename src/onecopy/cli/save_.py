"""onecopy save"""

import asyncio
from typing import Any

import click

from onecopy.cli.cold import cold_spec
from onecopy.cli.output import progress
from onecopy.cli.params import ReferenceType, accel_option, cold_options
from onecopy.model import Reference, format_size


@click.command("save")
@click.argument("system", type=ReferenceType("system"))
@click.option("--root", required=True, type=ReferenceType("segment"), help="The root segment.")
@cold_options
@accel_option
@click.option("--dry-run", is_flag=True, help="Print QEMU's command line and do nothing.")
def command(system: Reference, root: Reference, dry_run: bool, **options: Any) -> None:
    """Boot a guest, wait until it is ready, and save it as a system.

    Any number of guests then start from it in milliseconds (`onecopy run SYSTEM`), copy-on-write.
    """
    from onecopy.guest import boot, save
    from onecopy.guest.host import Host

    host, spec = Host.open(), cold_spec(root, **options)
    with progress() as tell:
        if dry_run:
            prepared = boot.prepare_cold(host, spec, tell)
            argv = save.dry_run(host, prepared)
        else:
            artifact = asyncio.run(save.save_system(host, system, spec, tell))
    if dry_run:
        import shlex

        print(shlex.join(argv))
    else:
        print(f"{artifact.ref} {artifact.digest} {format_size(artifact.size)}")
