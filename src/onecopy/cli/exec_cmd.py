"""onecopy exec"""

import select
import sys

import click

from onecopy.cli import streams
from onecopy.cli.commands import Command
from onecopy.cli.event_loop import asyncio
from onecopy.cli.params import GuestType, SecondsType, program_argument
from onecopy.model import require_text


@click.command(
    "exec",
    cls=Command,
    examples=[
        ("onecopy exec web ls -la /srv", "List a directory of the guest web."),
        ("onecopy exec --stdin web sh <setup.sh", "Run a script of this host in it."),
    ],
)
@click.argument("guest", type=GuestType())
@program_argument(required=True)
@click.option("-i", "--stdin", is_flag=True, help="Pass standard input to the program.")
@click.option(
    "--timeout",
    type=SecondsType(0.1),
    metavar="SECONDS",
    help="Kill the program after this time, in seconds, and exit with 124. Exit with 125 if the "
    "guest does not confirm that within 2 s. Default: no limit.",
)
def command(guest: str, program: tuple[str, ...], stdin: bool, timeout: float | None) -> int:
    """Run a program in a guest.

    The image needs no agent and no shell: busybox provides the programs that it lacks. Options of
    onecopy stand before GUEST. The command exits with the program's exit code, with 128 + N if
    signal N ended it, with 127 if there is no such program, and with 125 if onecopy failed.
    """
    from onecopy.guest.exec import run_streaming
    from onecopy.guest.exec_streams import Streams, to_file
    from onecopy.guest.runtime import Runtime

    folder = Runtime.open().guest_with_agent(guest).path
    for word in program:
        require_text(word)

    async def run() -> int:
        source = await _stdin() if stdin else None
        passed = Streams(to_file(1), to_file(2), source)
        return await run_streaming(folder, program, passed, timeout=timeout)

    return asyncio.run(run())


class _File(asyncio.StreamReader):
    """Standard input that never blocks: a file, or /dev/null."""

    async def read(self, n: int = -1) -> bytes:
        return streams.take(n)


async def _stdin() -> asyncio.StreamReader:
    try:
        with select.epoll() as poll:
            poll.register(0)
    except PermissionError:  # epoll(7) accepts no regular files, so asyncio does not either.
        return _File()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader
