"""onecopy build"""

import click

from onecopy.cli.commands import Command
from onecopy.cli.output import progress
from onecopy.cli.params import ReferenceType, SizeType, SourceType, domain_option, new_access
from onecopy.model import PageClass, Reference, check_new_name, format_size


@click.command(
    "build",
    cls=Command,
    examples=[
        (
            "onecopy build python --from debian:bookworm --include python3",
            "Install Debian packages into a root segment.",
        ),
        ("onecopy build app:1.0 --from dir:site", "Build version 1.0 of a segment from files."),
    ],
)
@click.argument("name", type=ReferenceType("segment"))
@click.option(
    "--from",
    "source",
    required=True,
    type=SourceType(),
    metavar="SOURCE",
    help="Read the content from debian:SUITE, dir:PATH, tar:PATH (also gzip, bzip2, xz, zstd) or "
    "disk:FILE[#PARTITION] (raw, qcow2, vmdk...; the root partition is found). kernel:FILE is a "
    "bare kernel.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PKG[,PKG...]",
    help="Install these Debian packages, too; only with debian:SUITE. May be repeated.",
)
@click.option(
    "--fs",
    type=click.Choice(["erofs", "ext2"]),
    default="erofs",
    show_default=True,
    help="File system of the image. Guests execute files in place from either.",
)
@click.option(
    "--class",
    "page_class",
    type=click.Choice(["SR", "ER", "EW"]),
    default="SR",
    show_default=True,
    help="Page class. SR: all guests share one copy. ER: each guest has a copy in memory. EW: each "
    "guest has a writable copy.",
)
@click.option(
    "--free-space",
    type=SizeType(),
    default="0",
    show_default=True,
    help="Free space for later changes, in bytes (8M, 1G); only with --fs ext2.",
)
@domain_option
def command(
    name: Reference,
    source: str,
    include: tuple[str, ...],
    fs: str,
    page_class: str,
    free_space: int,
    domain: str | None,
) -> None:
    """Build a segment from packages, files, an archive or a disk image.

    The same source gives the same digest. If NAME exists, it gets the new content; guests that use
    the old content keep it.
    """
    from onecopy.images.build import BuildOptions, build_segment
    from onecopy.store import Store

    check_new_name(name.name)
    packages = [name for part in include for name in part.split(",") if name]
    with progress() as tell:
        artifact = build_segment(
            Store(),
            name,
            source,
            BuildOptions(tuple(packages), fs, PageClass(page_class), free_space),
            access=new_access(domain),
            progress=tell,
        )
    print(f"{artifact.ref} {artifact.digest} {format_size(artifact.size)}")
