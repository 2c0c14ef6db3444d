"""onecopy save"""

import asyncio
import shlex
from typing import TYPE_CHECKING, Any

import click

from onecopy.cli.cold import cold_spec
from onecopy.cli.output import duration, progress
from onecopy.cli.params import GuestType, ReferenceType, accel_option, cold_options, typed_options
from onecopy.errors import InvalidInput
from onecopy.model import Reference, check_new_name, format_size

if TYPE_CHECKING:
    from onecopy.guest.host import Host
    from onecopy.guest.save import Saved


@click.command("save")
@click.argument("system", type=ReferenceType("system"))
@click.option("--root", type=ReferenceType("segment"), help="Boot this root segment and save it.")
@click.option("--from", "guest", type=GuestType(), help="Save this guest as it is; it runs on.")
@click.option(
    "--on-clone",
    metavar="CMD",
    help="Each clone runs CMD, by a shell, before it is handed out; not if that fails.",
)
@cold_options
@accel_option
@click.option("--dry-run", is_flag=True, help="Print QEMU's command line and do nothing.")
def command(
    system: Reference,
    root: Reference | None,
    guest: str | None,
    on_clone: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Save a guest as a system: one that is booted for it and is ready, or one that runs.

    Any number of guests then start from it in milliseconds (`onecopy run SYSTEM`), copy-on-write.
    """
    from onecopy.guest.host import Host

    if (root is None) == (guest is None):
        raise InvalidInput(
            "what is to be saved?", hint="give --root SEGMENT to boot one, or --from GUEST"
        )
    check_new_name(system.name)
    host = Host.open()
    if guest is not None:
        _require_no_more()
        _print(_running(host, system, guest, on_clone))
    elif root is not None and dry_run:
        print(shlex.join(_argv(host, root, options)))
    elif root is not None:
        _print(_booted(host, system, root, options, on_clone))


def _require_no_more() -> None:
    typed = typed_options()
    boots = [typed[key] for key in typed if key not in ("system", "guest", "on_clone")]
    if boots:
        raise InvalidInput(
            f"{boots[0]} says how to boot a guest, and this one runs", hint="leave it out"
        )


def _running(host: "Host", system: Reference, guest: str, on_clone: str | None) -> "Saved":
    from onecopy.guest import save

    with progress() as tell:
        return asyncio.run(save.save_guest(host, system, guest, tell, on_clone=on_clone))


def _booted(
    host: "Host", system: Reference, root: Reference, options: dict[str, Any], on_clone: str | None
) -> "Saved":
    from onecopy.guest import save

    with progress() as tell:
        spec = cold_spec(root, **options)
        return asyncio.run(save.save_system(host, system, spec, tell, on_clone=on_clone))


def _argv(host: "Host", root: Reference, options: dict[str, Any]) -> list[str]:
    from onecopy.guest import cold, save

    with progress() as tell:
        return save.dry_run(host, cold.prepare_cold(host, cold_spec(root, **options), tell))


def _print(saved: "Saved") -> None:
    artifact = saved.artifact
    print(f"{artifact.ref} {artifact.digest} {format_size(artifact.size)}")
    print(
        f"{format_size(saved.stored)} of {format_size(saved.memory)} of RAM stored; "
        f"the guest stood {duration(saved.pause)}"
    )
