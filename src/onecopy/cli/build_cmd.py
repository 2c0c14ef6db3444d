"""onecopy build"""

import click

from onecopy.cli.output import progress
from onecopy.cli.params import ReferenceType, SizeType, domain_option, new_access
from onecopy.model import PageClass, Reference, check_new_name, format_size


@click.command("build")
@click.argument("name", type=ReferenceType("segment"))
@click.option(
    "--from",
    "source",
    required=True,
    metavar="SOURCE",
    help="debian:SUITE, dir:PATH, tar:PATH (also .gz .bz2 .xz .zst), disk:FILE[#PARTITION]: a "
    "disk image (raw, qcow2, vmdk...), whose root is found; or kernel:FILE, booted by itself.",
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
@click.option(
    "--class",
    "page_class",
    type=click.Choice(["SR", "ER", "EW"]),
    default="SR",
    show_default=True,
    help="SR: one copy for all guests. ER: one in memory for each. EW: each has its own to write.",
)
@click.option(
    "--room", type=SizeType(), default="0", help="With --fs ext2: free space for later changes."
)
@domain_option
def command(
    name: Reference,
    source: str,
    include: tuple[str, ...],
    fs: str,
    page_class: str,
    room: int,
    domain: str | None,
) -> None:
    """Build a segment from Debian packages, a folder, a tar archive or a disk image.

    The same source gives the same digest. Guests that use the segment's present version keep it.
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
            BuildOptions(tuple(packages), fs, PageClass(page_class), room),
            access=new_access(domain),
            progress=tell,
        )
    print(f"{artifact.ref} {artifact.digest} {format_size(artifact.size)}")
