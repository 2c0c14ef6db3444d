"""`python -m tests.fuzz`: read many hostile inputs, print what became of them."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Callable, Sequence

from onecopy.cli.output import progress
from onecopy.cli.tables import print_table
from tests.fuzz.campaign import Failure, Tally, one, run
from tests.fuzz.readers import Reader, readers


def main() -> int:
    """0 if no input broke the rule."""
    parser = argparse.ArgumentParser(
        prog="script/fuzz", description=__doc__.partition(": ")[2] if __doc__ else ""
    )
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all; default: 1000000")
    parser.add_argument("--seed", type=int, help="for the same inputs again")
    parser.add_argument("--reader", help="only this one")
    parser.add_argument("--number", type=int, help="only this input, here and now")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    known = readers()
    if arguments.number is not None:
        data, what = one(seed, known[arguments.reader], arguments.number)
        print(f"{data!r}\n{what}")
        return int(what != "as documented")
    chosen = [known[arguments.reader]] if arguments.reader else list(known.values())
    print(f"seed {seed}", flush=True)
    with progress() as tell:
        tallies = fuzz(seed, chosen, arguments.inputs, tell)
    return show(seed, tallies)


def fuzz(
    seed: int,
    chosen: Sequence[Reader],
    inputs: int,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Tally]:
    """Read ``inputs`` in all, by the readers' shares; ``tell`` is told each reader's name."""
    whole = sum(reader.share for reader in chosen)
    tallies = {}
    for reader in chosen:
        tell(reader.name)
        count = -(-inputs * reader.share // whole)
        tallies[reader.name] = found = run(seed, reader, count, os.cpu_count() or 1)
        # A long one that is ended before its end was not for nothing.
        tell(f"{reader.name}: {count} inputs, {len(found.failures)} failures")
    return tallies


def show(seed: int, tallies: dict[str, Tally]) -> int:
    """Print a table and each kind of failure once; 1 if there is one."""
    rows = [
        [name, str(each.inputs), f"{each.seconds:.1f}", str(len(each.failures))]
        for name, each in tallies.items()
    ]
    total = list(tallies.values())
    sums = [sum(each.inputs for each in total), sum(len(each.failures) for each in total)]
    rows.append(["all", str(sums[0]), f"{sum(each.seconds for each in total):.1f}", str(sums[1])])
    print_table(["READER", "INPUTS", "SECONDS", "FAILURES"], rows)
    kinds: dict[tuple[str, str], Failure] = {}
    for failure in (found for each in total for found in each.failures):
        kinds.setdefault((failure.reader, failure.what), failure)
    for failure in kinds.values():
        print(failure.line(seed))
    return int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
