"""onecopy build"""

import click

from onecopy.cli.output import progress
from onecopy.cli.params import ReferenceType
from onecopy.model import Reference, format_size


@click.command("build")
@click.argument("name", type=ReferenceType("segment"))
@click.option(
    "--from",
    "source",
    required=True,
    metavar="SOURCE",
    help="debian:SUITE, dir:PATH or tar:PATH (also .gz .bz2 .xz .zst).",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PKG[,PKG...]",
    help="With debian: packages to install. May be repeated.",
)
@click.option(
    "--fs",
    type=click.Choice(["erofs", "ext2"]),
    default="erofs",
    show_default=True,
    help="File system of the image; both are executed in place.",
)
def command(name: Reference, source: str, include: tuple[str, ...], fs: str) -> None:
    """Build a segment from Debian packages, a folder or a tar archive.

    The same source gives the same digest. Guests that use the segment's present version keep it.
    """
    from onecopy.build.segment import build_segment
    from onecopy.store import Store

    packages = [name for part in include for name in part.split(",") if name]
    with progress() as tell:
        artifact = build_segment(Store(), name, source, include=packages, fs=fs, progress=tell)
    print(f"{artifact.ref} {artifact.digest} {format_size(artifact.size)}")
