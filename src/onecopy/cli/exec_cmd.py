"""onecopy exec"""

import asyncio
import select
import sys

import click

from onecopy.cli import streams
from onecopy.cli.params import GuestType, SecondsType
from onecopy.model import require_text


@click.command("exec", context_settings={"ignore_unknown_options": False})
@click.argument("guest", type=GuestType())
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-i", "--stdin", is_flag=True, help="Pass standard input on to the program.")
@click.option(
    "--timeout",
    type=SecondsType(0.1),
    metavar="SECONDS",
    help="Kill the program after this time and exit with 124; with 125 if the guest does not "
    "confirm that within 2 s.",
)
def command(guest: str, cmd: tuple[str, ...], stdin: bool, timeout: float | None) -> int:
    """Run a program in a guest.

    Needs nothing in the image: programs it lacks (a shell, ps...) come from busybox. Exits with the
    program's exit code, 128 + n if signal n ended it, 127 if there is none of that name, or 125 if
    onecopy itself failed.
    """
    from onecopy.guest.exec import run_streaming
    from onecopy.guest.exec_streams import Streams, to_file
    from onecopy.guest.runtime import Runtime

    folder = Runtime.open().guest_with_agent(guest).path
    for word in cmd:
        require_text(word)

    async def run() -> int:
        source = await _stdin() if stdin else None
        passed = Streams(to_file(1), to_file(2), source)
        return await run_streaming(folder, cmd, passed, timeout=timeout)

    return asyncio.run(run())


class _File(asyncio.StreamReader):
    """Standard input that never blocks: a file, or /dev/null."""

    async def read(self, n: int = -1) -> bytes:
        return streams.take(n)


async def _stdin() -> asyncio.StreamReader:
    try:
        with select.epoll() as poll:
            poll.register(0)
    except PermissionError:  # epoll(7) takes no files, and so asyncio does not either
        return _File()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader
