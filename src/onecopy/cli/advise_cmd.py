"""onecopy advise"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import print_json, print_line, progress
from onecopy.cli.params import GuestType, NameType, json_option
from onecopy.cli.tables import print_table
from onecopy.errors import InvalidInput

if TYPE_CHECKING:
    from onecopy.guest.observe.advise import Advised
    from onecopy.sharing.survey import Survey

_PATH = click.Path(path_type=Path)


@click.command(
    "advise",
    cls=Command,
    examples=[
        ("onecopy advise", "Compare the memory of all QEMU processes of this host."),
        (
            "onecopy advise --root vm.qcow2 --apply base vm-1 vm-2",
            "Find the pages of an image in two guests, and build a segment from it.",
        ),
    ],
)
@click.argument("guests", nargs=-1, type=GuestType(), metavar="[GUEST]...")
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=_PATH,
    metavar="IMAGE|DIRECTORY",
    help="Compare guests with this disk image or directory, which their root file systems came "
    "from. Disks that QEMU has open are compared anyway. May be repeated.",
)
@click.option(
    "--files",
    multiple=True,
    type=_PATH,
    metavar="DIRECTORY",
    help="Compare guests with these files, which a segment could hold. Segments in the store are "
    "compared anyway. May be repeated.",
)
@click.option(
    "--apply",
    "name",
    type=NameType(),
    metavar="NAME",
    help="Build the advised segment under this name.",
)
@click.option(
    "--html", type=_PATH, metavar="FILE", help="Also write the result as an HTML page to this file."
)
@json_option
def command(
    guests: tuple[str, ...],
    roots: tuple[Path, ...],
    files: tuple[Path, ...],
    name: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Find memory that guests could share.

    Without GUEST the command reads all guests, including QEMU processes that other programs
    started. Guests keep running, and their memory is not changed. SAVES is the most memory, in MiB,
    that the host would get back.
    """
    from onecopy.guest.observe import advise
    from onecopy.guest.runtime import Runtime

    host = Runtime.open()
    with progress() as tell:
        found = advise.look(
            host, guests, roots=roots, files=files, name=name or "shared", tell=tell
        )
        built = advise.apply(host, found, tell) if name else []
    if html:
        _write(html, found)
    if as_json:
        print_json(found.to_json() | {"built": [artifact.ref for artifact in built]})
        return
    _print(found)
    for artifact in built:
        print(f"built {artifact.ref} {artifact.digest}")
    if name and not built:
        print("No segment was built: the advice names none.")


def _write(path: Path, found: Advised) -> None:
    from onecopy.sharing.advice_page import page

    text = page(found.survey, [(shlex.join(step.argv), step.why) for step in found.steps])
    try:
        path.write_text(text)
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}",
            hint="name a file in a directory that you may write to",
        ) from error


def _print(found: Advised) -> None:
    from onecopy.sharing.advice import KINDS, WAYS

    advice = found.survey.advice
    rows = [
        [
            each.name,
            *(_mib(n) for n in (each.ram_size, each.own, each.shared, each.merged, each.swapped)),
        ]
        for each in advice.guests
    ]
    print_table(["GUEST", "RAM", "OWN", "SHARED", "MERGED", "SWAPPED"], rows)
    for left in found.survey.left_out:
        print_line(f"{left.name} was skipped: {left.reason}")
    for note in sorted({each.note for each in advice.guests if each.note}):
        print_line(note)
    print("OWN: memory that only this guest uses. It was compared; shared memory was not.\n")
    kinds = [[_mib(advice.kinds[key]), counts] for key, counts in KINDS.items()]
    print_table(["OWN", "IS"], kinds)
    print()
    ways = [
        [way.name, _mib(way.saves), _mib(way.alone), _cost(way.name, found.survey), WAYS[way.name]]
        for way in advice.ways
    ]
    print_table(["WAY", "SAVES", "ALONE", "CPU", "IS"], ways)
    print("ALONE: memory that no other way saves.\n")
    if advice.overlaps:
        overlaps = sorted(advice.overlaps.items(), key=lambda item: -item[1])
        print_table(["MiB", "SAVED BY"], [[_mib(size), key] for key, size in overlaps])
        print()
    if advice.files:
        names = [[_mib(f.copies), str(f.guests), f.name] for f in advice.files[:10]]
        print_table(["COPIES", "GUESTS", "FILE"], names)
        print()
    print_line(f"Advice: {' and '.join(advice.take) or 'nothing'}. {advice.reason}.")
    for step in found.steps:
        print_line(f"    {shlex.join(step.argv)}    # {step.why}")


def _cost(name: str, survey: Survey) -> str:
    return f"{survey.cpu_seconds:.1f} s per pass" if name == "ksm" else "none"


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.1f}"
