"""onecopy save"""

import asyncio
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from onecopy.cli.cold import boot_spec
from onecopy.cli.output import duration, print_json, print_line, progress
from onecopy.cli.params import (
    GuestType,
    HookType,
    ReferenceType,
    accel_option,
    cold_options,
    json_option,
    typed_options,
)
from onecopy.errors import InvalidInput
from onecopy.model import Reference, check_new_name, format_size

if TYPE_CHECKING:
    from onecopy.guest.lifecycle.save import Saved
    from onecopy.guest.machine import Generator
    from onecopy.guest.runtime import Runtime

#: Options that go with --from, too.
_FOR_ALL = ("system", "guest", "on_clone", "clone_hooks", "as_json")


@click.command("save")
@click.argument("system", type=ReferenceType("system"))
@click.option("--root", type=ReferenceType("segment"), help="Boot this root segment and save it.")
@click.option("--from", "guest", type=GuestType(), help="Save this guest as it is; it runs on.")
@click.option(
    "--on-clone",
    metavar="CMD",
    help="Each clone runs CMD, by a shell, before it is handed out; not if that fails.",
)
@click.option(
    "--clone-hook",
    "clone_hooks",
    multiple=True,
    type=HookType(),
    metavar="HOOK",
    help="Each clone runs HOOK before it is handed out, and before --on-clone: a ready one by its "
    "name, auto (all for programs found in the guest), none, restart:UNIT, restart:PROGRAM or "
    "signal:NAME:PROGRAM. May be repeated.",
)
@cold_options
@accel_option
@click.option("--dry-run", is_flag=True, help="Print QEMU's command line and do nothing.")
@json_option
def command(
    system: Reference,
    root: Reference | None,
    guest: str | None,
    on_clone: str | None,
    clone_hooks: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Save a guest as a system: one that is booted for it and is ready, or one that runs.

    Any number of guests then start from it in milliseconds (`onecopy run SYSTEM`), copy-on-write.
    Programs with random generators of their own draw alike in all of them: a warning names these,
    and --clone-hook has them seeded again.
    """
    from onecopy.guest.runtime import Runtime

    if (root is None) == (guest is None):
        raise InvalidInput(
            "what is to be saved?", hint="give --root SEGMENT to boot one, or --from GUEST"
        )
    check_new_name(system.name)
    host = Runtime.open()
    # None leaves what a clone that is saved has from its own saved system.
    hooks = Hooks(on_clone, clone_hooks or None)
    if guest is not None:
        _require_no_more()
        _print(_running(host, system, guest, hooks), as_json)
    elif root is not None and dry_run:
        print(shlex.join(_argv(host, system, root, options)))
    elif root is not None:
        _print(_booted(host, system, root, options, hooks), as_json)


class Hooks(NamedTuple):
    """What each clone runs before it is handed out."""

    on_clone: str | None
    clone_hooks: tuple[str, ...] | None


def _require_no_more() -> None:
    typed = typed_options()
    boots = [typed[key] for key in typed if key not in _FOR_ALL]
    if boots:
        raise InvalidInput(
            f"{boots[0]} says how to boot a guest, and this one runs", hint="leave it out"
        )


def _running(host: "Runtime", system: Reference, guest: str, hooks: Hooks) -> "Saved":
    from onecopy.guest.lifecycle import save

    with progress() as tell:
        return asyncio.run(save.save_guest(host, system, guest, tell, **hooks._asdict()))


def _booted(
    host: "Runtime", system: Reference, root: Reference, options: dict[str, Any], hooks: Hooks
) -> "Saved":
    from onecopy.guest.lifecycle import save

    with progress() as tell:
        spec = boot_spec(root, **options)
        return asyncio.run(save.save_system(host, system, spec, tell, **hooks._asdict()))


def _argv(
    host: "Runtime", system: Reference, root: Reference, options: dict[str, Any]
) -> list[str]:
    from onecopy.guest.lifecycle import launcher, save

    with progress() as tell:
        plan = save.plan_save(host, system, boot_spec(root, **options), tell)
    return launcher.dry_run(host, plan)


def _print(saved: "Saved", as_json: bool) -> None:
    artifact = saved.artifact
    if as_json:
        print_json(document(saved))
    else:
        print(f"{artifact.ref} {artifact.digest} {format_size(artifact.size)}")
        print(
            f"{format_size(saved.stored)} of {format_size(saved.memory)} of RAM stored; "
            f"the guest stood {duration(saved.pause)}"
        )
    for line in warning(saved.generators):
        print_line(f"onecopy: {line}", sys.stderr)


def document(saved: "Saved") -> dict[str, Any]:
    """What --json prints (docs/json.md)."""
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


def _way(found: "Generator") -> str:
    if found.hook:
        return f"--clone-hook {found.hook}"
    if found.unit.endswith(".service"):
        return f"--clone-hook restart:{found.unit}"
    return f"--clone-hook signal:NAME:{found.program}, if a signal has it seed again"


def warning(generators: "Sequence[Generator]") -> list[str]:
    """What clones have in common, and what to do about it; nothing if nothing is left to do."""
    left = sorted((g for g in generators if not g.covered), key=lambda g: not g.secrets)
    if not left:
        return []
    lines = ["warning: all clones draw the same random values from these programs' generators:"]
    for each in left:
        kind = "keys and tokens" if each.secrets else "numbers"
        unit = f" in {each.unit}" if each.unit else ""
        lines.append(f"  {each.program}{unit} ({each.source}): {kind}; {_way(each)}")
    lines.append(
        "save again with these hooks (auto: all ready ones), or have --on-clone restart the "
        "programs; docs/saved-systems.md"
    )
    return lines
