"""onecopy save"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.output import duration, print_json, print_line, progress
from onecopy.cli.params import GuestType, ReferenceType, json_option
from onecopy.cli.start_options import BOOT, BootOptions, HookType, boot_options
from onecopy.errors import InvalidInput
from onecopy.model import Reference, check_new_name, format_size

if TYPE_CHECKING:
    from onecopy.guest.lifecycle.clone_hooks import Hooks
    from onecopy.guest.lifecycle.launchplan import BootSpec
    from onecopy.guest.lifecycle.save import Saved
    from onecopy.guest.machine import Generator
    from onecopy.guest.runtime import Runtime


@click.command(
    "save",
    cls=Command,
    examples=[
        (
            "onecopy save hello --root python --segment app:/srv --command 'python3 /srv/app.py'",
            "Boot a guest, and save it once it is ready.",
        ),
        ("onecopy save --from web-1 later", "Save the running guest web-1."),
    ],
    option_groups={BOOT: "Options with --root"},
)
@click.argument("system", type=ReferenceType("system"))
@click.option("--root", type=ReferenceType("segment"), help="Boot this root segment, and save it.")
@click.option(
    "--from", "guest", type=GuestType(), help="Save this running guest, which keeps running."
)
@click.option(
    "--clone-hook",
    "clone_hooks",
    multiple=True,
    type=HookType(),
    metavar="HOOK",
    help="Run HOOK in each clone when it starts; the start fails if HOOK fails. HOOK is a ready "
    "one by name, auto (all ready ones for programs found in the guest), none, restart:UNIT, "
    "restart:PROGRAM, signal:NAME:PROGRAM or command:CMD, a shell command, which runs last. May be "
    "repeated.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print QEMU's command line, and save nothing; only with --root.",
)
@json_option
@boot_options
def command(
    system: Reference,
    root: Reference | None,
    guest: str | None,
    clone_hooks: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    boot: BootOptions,
) -> None:
    """Save a guest as a system that clones start from.

    The command boots a guest (--root) and saves it when it is ready, or saves a running guest
    (--from). `onecopy run SYSTEM` then starts any number of clones in milliseconds; they share the
    saved memory copy-on-write.

    Programs with random generators of their own draw the same values in all clones. A warning names
    them, and clone hooks reseed them.
    """
    from onecopy.guest.lifecycle.clone_hooks import parse_hooks
    from onecopy.guest.runtime import Runtime

    if (root is None) == (guest is None):
        raise InvalidInput(
            "--root and --from: exactly one of them is needed",
            hint="give --root SEGMENT to boot a guest, or --from GUEST",
        )
    check_new_name(system.name)
    hooks = parse_hooks(clone_hooks or None)
    host = Runtime.open()
    if guest is not None:
        _require_no_boot()
        _print(_running(host, system, guest, hooks), as_json)
    elif root is not None and dry_run:
        print(shlex.join(_argv(host, system, boot.spec(root))))
    elif root is not None:
        _print(_booted(host, system, boot.spec(root), hooks), as_json)


def _require_no_boot() -> None:
    """Raise InvalidInput for an option of a boot, which a running guest cannot have."""
    context = click.get_current_context()
    for each in context.command.params:
        name = each.name or ""
        typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if typed and (name in BootOptions._fields or name == "dry_run"):
            raise InvalidInput(
                f"{each.opts[0]} needs --root: the guest of --from runs already",
                hint=f"leave {each.opts[0]} out",
            )


def _running(host: Runtime, system: Reference, guest: str, hooks: Hooks) -> Saved:
    from onecopy.guest.lifecycle import save

    with progress() as tell:
        return asyncio.run(save.save_guest(host, system, guest, tell, hooks))


def _booted(host: Runtime, system: Reference, spec: BootSpec, hooks: Hooks) -> Saved:
    from onecopy.guest.lifecycle import save

    with progress() as tell:
        return asyncio.run(save.save_system(host, system, spec, tell, hooks))


def _argv(host: Runtime, system: Reference, spec: BootSpec) -> list[str]:
    from onecopy.guest.lifecycle import launcher, save

    with progress() as tell:
        plan = save.plan_save(host, system, spec, tell)
    return launcher.dry_run(host, plan)


def _print(saved: Saved, as_json: bool) -> None:
    artifact = saved.artifact
    if as_json:
        print_json(document(saved))
    else:
        print(f"{artifact.ref} {artifact.digest} {format_size(artifact.size)}")
        print(
            f"{format_size(saved.stored)} of {format_size(saved.memory)} of RAM stored; "
            f"guest paused for {duration(saved.pause)}"
        )
    for line in warning(saved.generators):
        print_line(f"onecopy: {line}", sys.stderr)


def document(saved: Saved) -> dict[str, Any]:
    """Return the object that --json prints (docs/json.md)."""
    import msgspec

    return {
        "ref": saved.artifact.ref,
        "digest": saved.artifact.digest,
        "size": saved.artifact.size,
        "memory": saved.memory,
        "stored": saved.stored,
        "pause": saved.pause,
        "clone_hooks": list(saved.clone_hooks),
        "generators": msgspec.to_builtins(saved.generators),
    }


def _way(found: Generator) -> str:
    if found.hook:
        return f"--clone-hook {found.hook}"
    if found.unit.endswith(".service"):
        return f"--clone-hook restart:{found.unit}"
    return f"--clone-hook signal:NAME:{found.program}, if a signal makes it reseed"


def warning(generators: Sequence[Generator]) -> list[str]:
    """Return lines about random generators that clones share; none if hooks cover all."""
    left = sorted((g for g in generators if not g.covered), key=lambda g: not g.secrets)
    if not left:
        return []
    lines = ["warning: the random generators of these programs give all clones the same values:"]
    for each in left:
        kind = "keys and tokens" if each.secrets else "numbers"
        unit = f" in {each.unit}" if each.unit else ""
        lines.append(f"  {each.program}{unit} ({each.source}): {kind}; {_way(each)}")
    lines.append(
        "save again with these hooks (auto: all ready ones), or restart the programs with "
        "--clone-hook command:CMD; docs/saved-systems.md"
    )
    return lines
