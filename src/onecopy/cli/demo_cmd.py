"""onecopy demo"""

import asyncio
import json
from pathlib import Path

import click

from onecopy.cli.output import print_table, progress
from onecopy.cli.params import accel_option


@click.command("demo")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    default="onecopy-demo.svg",
    show_default=True,
    help="Where to write the picture (SVG).",
)
@accel_option
def command(json_file: Path | None, picture: Path, accel: str) -> int:
    """Show it all: build, save, start guests cold and saved, compare.

    Exits with 1 if not every guest answered with its own name.
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
