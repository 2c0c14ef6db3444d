"""onecopy demo"""

import json
from pathlib import Path

import click

from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.output import progress
from onecopy.cli.params import accel_option
from onecopy.cli.tables import print_table


@click.command(
    "demo",
    cls=Command,
    examples=[
        ("onecopy demo", "Run the demo, and draw onecopy-demo.svg."),
        ("onecopy demo --json figures.json", "Also write the figures to a file."),
    ],
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write the figures to this file, as JSON.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    default="onecopy-demo.svg",
    show_default=True,
    metavar="FILE",
    help="Write the picture (SVG) to this file.",
)
@accel_option()
def command(json_file: Path | None, picture: Path, accel: str) -> int:
    """Build, save, boot and clone guests, and compare their cost.

    The command exits with 1 if a guest did not answer with its own name.
    """
    from onecopy.demo import main, show
    from onecopy.guest.runtime import Runtime
    from onecopy.vmm.accel import Choice

    with progress() as tell:
        reason, batches = asyncio.run(main.run(Runtime.open(), Choice(accel), tell))
    print_table(show.HEADINGS, show.rows(batches))
    print()
    for note in show.NOTES:
        print(note)
    result = show.as_json(reason, batches)
    print(
        f"\nA guest from the saved system answers {result['speedup']:.0f} times sooner ({reason})."
    )
    picture.write_text(show.picture(reason, batches))
    print(f"Picture: {picture}")
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(batch.answered < batch.guests for batch in batches))
