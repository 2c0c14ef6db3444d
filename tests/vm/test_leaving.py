"""Programs that exit without closing their Host end, and so do their guests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import onecopy
from onecopy import aio
from onecopy.guest.runtime import Runtime
from onecopy.store import Artifact
from tests.vm.conftest import vmms

#: Seconds after which something that must not block has blocked.
STUCK = 120

_BEGIN = """
import asyncio, os, sys, threading
from contextlib import ExitStack
import onecopy
from onecopy import aio
system = sys.argv[1]
stack = ExitStack()
"""
_OPEN = """
host = stack.enter_context(onecopy.Host())
guests = stack.enter_context(host.start(system, 2))
print(*(each.exec(["hostname"]).text.strip() for each in guests), flush=True)
"""
_ASYNC = """
async def begin():
    host = await aio.Host().open()
    block = host.start(system, 2)
    guests = await block.__aenter__()
    print(*[(await each.exec(["hostname"])).text.strip() for each in guests], flush=True)
    return host, block
"""
PROGRAMS = {
    "the end": (_OPEN, 0),
    "an exception": (_OPEN + "raise ValueError('ours')", 1),
    "sys.exit": (_OPEN + "sys.exit(3)", 3),
    "a waiting daemon": (
        _OPEN
        + """
def wait():
    try:
        guests[0].wait()
    except RuntimeError:
        pass  # it was closed

threading.Thread(target=wait, daemon=True).start()
""",
        0,
    ),
    "a child": (
        _OPEN
        + """
if not os.fork():
    sys.exit(0)  # it is not the child's
assert os.wait()[1] == 0
assert len(host.guests()) == 2 and guests[0].exec(["true"]).exit_code == 0
""",
        0,
    ),
    "a thread's block": (
        """
def work():
    with onecopy.Host() as host, host.start(system, 2) as guests:
        ready.set()
        print(*(each.exec(["hostname"]).text.strip() for each in guests), flush=True)
        assert not guests[0].wait(0.5)

ready = threading.Event()
threading.Thread(target=work).start()
ready.wait()
""",
        0,
    ),
    "a loop's end": (_ASYNC + "kept = asyncio.run(begin())", 0),
    "a loop that is left": (
        _ASYNC + "loop = asyncio.new_event_loop(); kept = loop.run_until_complete(begin())",
        0,
    ),
}


@pytest.mark.parametrize("how", PROGRAMS)
def test_it_ends_and_so_do_its_guests(
    host: Runtime, saved: Artifact, tmp_path: Path, how: str
) -> None:
    text, code = PROGRAMS[how]
    program = tmp_path / "program.py"
    program.write_text(_BEGIN + text)
    argv = [sys.executable, str(program), saved.ref]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=STUCK)
    assert done.returncode == code, done.stderr
    assert len(done.stdout.split()) == 2
    if not code:
        assert done.stderr == ""
    # Not even the next command is needed.
    assert vmms(host) == []
    assert host.folders() == []
    assert [path.name for path in host.run.iterdir() if path.name.startswith(".owner")] == []


def test_open_and_close(host: Runtime, saved: Artifact) -> None:
    mine = onecopy.Host()
    for use in (mine.guests, mine.artifacts, mine.report, lambda: mine.guest("x")):
        with pytest.raises(RuntimeError, match="not open"):
            use()
    with pytest.raises(RuntimeError, match="not open"), mine.start(saved.ref):
        pass
    mine.close()
    for _ in range(2):
        assert mine.open() is mine
        with pytest.raises(RuntimeError, match="open already"):
            mine.open()
        block = mine.start(saved.ref)
        (guest,) = block.__enter__()
        assert mine.guests()[0].name == guest.name
        mine.close()
        mine.close()
        assert vmms(host) == []
        with pytest.raises(RuntimeError, match="closed"):
            guest.exec(["true"])
        block.__exit__(None, None, None)


def test_open_and_close_for_asyncio(host: Runtime, saved: Artifact) -> None:
    async def main() -> None:
        mine = aio.Host()
        with pytest.raises(RuntimeError, match="not open"):
            mine.guests()
        assert await mine.open() is mine
        async with mine.start(saved.ref) as [guest]:
            assert os.path.exists(f"/proc/{guest.record.pid}")  # noqa: PTH110
            await mine.close()
            await mine.close()
            assert vmms(host) == []
        with pytest.raises(RuntimeError, match="closed"):
            mine.guests()

    asyncio.run(main())
