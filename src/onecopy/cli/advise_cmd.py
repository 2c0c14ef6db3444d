"""onecopy advise"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onecopy.cli.output import print_json, print_line, print_table, progress
from onecopy.cli.params import NameType, json_option
from onecopy.errors import InvalidInput

if TYPE_CHECKING:
    from onecopy.guest.observe.advise import Advised
    from onecopy.sharing.survey import Survey

_PATH = click.Path(path_type=Path)


@click.command("advise")
@click.argument("guests", nargs=-1, metavar="[GUEST]...")
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=_PATH,
    metavar="IMAGE|FOLDER",
    help="What guests' root file systems were made from, beside the disks that QEMU names.",
)
@click.option(
    "--files",
    multiple=True,
    type=_PATH,
    metavar="FOLDER",
    help="Files that a further segment could have, beside the segments that are stored.",
)
@click.option(
    "--apply",
    "name",
    type=NameType(),
    metavar="NAME",
    help="Build the segment that is advised, under this name.",
)
@click.option("--html", type=_PATH, metavar="FILE", help="Write a page with pictures, too.")
@json_option
def command(
    guests: tuple[str, ...],
    roots: tuple[Path, ...],
    files: tuple[Path, ...],
    name: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Read the memory of guests, and say what they could share, and how.

    All guests, also those that other programs started, if none is named. They go on meanwhile, and
    nothing of them is changed. Figures are MiB of memory that the host would get back, at most.
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
        print("No segment is advised that could be built: nothing was.")


def _write(path: Path, found: Advised) -> None:
    from onecopy.sharing.advice_page import page

    text = page(found.survey, [(shlex.join(step.argv), step.why) for step in found.steps])
    try:
        path.write_text(text)
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}", hint="name a file in a folder that you may"
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
        print_line(f"{left.name} was left out: {left.reason}")
    for note in sorted({each.note for each in advice.guests if each.note}):
        print_line(note)
    print(
        "OWN: what the guest has alone, and was compared; what is shared or merged costs nothing.\n"
    )
    kinds = [[_mib(advice.kinds[key]), counts] for key, counts in KINDS.items()]
    print_table(["OWN", "IS"], kinds)
    print()
    ways = [
        [way.name, _mib(way.saves), _mib(way.alone), _cost(way.name, found.survey), WAYS[way.name]]
        for way in advice.ways
    ]
    print_table(["WAY", "SAVES", "ALONE", "CPU", "IS"], ways)
    print("ALONE: what no other way saves.\n")
    if advice.overlaps:
        overlaps = sorted(advice.overlaps.items(), key=lambda item: -item[1])
        print_table(["MiB", "SAVED BY"], [[_mib(size), key] for key, size in overlaps])
        print()
    if advice.files:
        names = [[_mib(f.copies), str(f.guests), f.name] for f in advice.files[:10]]
        print_table(["COPIES", "GUESTS", "FILE"], names)
        print()
    print_line(f"Take: {' and '.join(advice.take) or 'nothing'}. {advice.reason}.")
    for step in found.steps:
        print_line(f"    {shlex.join(step.argv)}    # {step.why}")


def _cost(name: str, survey: Survey) -> str:
    return f"{survey.cpu_seconds:.1f} s a pass" if name == "ksm" else "none"


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / (1 << 20):.1f}"
