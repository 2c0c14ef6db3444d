"""QMP with a peer that is no QEMU: silent, taken over, or gone. Over real sockets.

Not here: a real QEMU (tests/vm, tests/hostile).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecopy.deadline import Deadline
from onecopy.errors import GuestFailed, NoSlot
from onecopy.guest.exec_ports import plugged
from onecopy.linux.lock import locked
from onecopy.vmm.monitor import connect
from tests.unit.vmm_replies import REPLY

STUCK = 30.0
GREETING = {"QMP": {"version": {"qemu": {"major": 7}, "package": ""}, "capabilities": []}}
Answer = Callable[[dict[str, Any]], bytes | None]


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def done(request: dict[str, Any], value: object = None) -> bytes:
    """The answer to what was done."""
    return line({"return": {} if value is None else value, "id": request.get("id")})


@contextlib.asynccontextmanager
async def qemu(
    folder: Path, answer: Answer, greeting: bytes = line(GREETING)
) -> AsyncIterator[Path]:
    """Serves like QEMU at monitor.sock, but for what it answers; None is no answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(greeting)
            while data := await reader.read(1 << 16):
                # One request comes at a time, and a blank with each descriptor.
                if text := data.decode().strip():
                    request = json.loads(text)
                    capabilities = request["execute"] == "qmp_capabilities"
                    if said := done(request) if capabilities else answer(request):
                        writer.write(said)
        writer.close()

    path = folder / "monitor.sock"
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()
        path.unlink()


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(STUCK):
            return await work

    return asyncio.run(main())


def silent(_: dict[str, Any]) -> None:
    return None


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"hello\n",
        line(1),
        line({}),
        line({"QMP": 1}),
        line({"QMP": {}}),
        line({"QMP": {"version": {}, "capabilities": 1}}),
        b"[" * 100_000 + b"]" * 100_000 + b"\n",
        b'{"QMP": ' + b"9" * 5000 + b"}\n",
        b"\xff\xfe\n",
        b"x" * (11 << 20),
    ],
    ids=lambda greeting: repr(greeting[:20]),
)
def test_a_greeting_that_is_none(tmp_path: Path, greeting: bytes) -> None:
    async def main() -> None:
        async with qemu(tmp_path, silent, greeting) as path:
            with pytest.raises(GuestFailed):
                async with connect(path.parent, Deadline.after(1)):
                    pass

    began = time.monotonic()
    run(main())
    assert time.monotonic() - began < 3


def test_a_command_that_is_not_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with qemu(tmp_path, silent) as path, connect(path.parent) as monitor:
            with pytest.raises(GuestFailed, match=r"did not answer query-x within 0\.1 s"):
                await monitor.execute("query-x", timeout=0.1)

    run(main())


def test_an_answer_that_comes_too_late_is_that_of_nothing_else(tmp_path: Path) -> None:
    held: list[bytes] = []

    def late(request: dict[str, Any]) -> bytes | None:
        held.append(done(request, request["execute"]))
        return b"".join(held) if len(held) > 1 else None

    async def main() -> None:
        async with qemu(tmp_path, late) as path, connect(path.parent) as monitor:
            with pytest.raises(GuestFailed):
                await monitor.execute("one", timeout=0.1)
            assert await monitor.ask("two", str) == "two"

    run(main())


def test_nobody_listens(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(GuestFailed, match="ended before it answered"):
            async with connect(tmp_path):
                pass

    run(main())


def test_a_queue_that_is_full(tmp_path: Path) -> None:
    """A QEMU that is stopped takes no connection, and then the kernel no more of them."""
    path = tmp_path / "monitor.sock"

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as ends:
            listener.bind(str(path))
            listener.listen(0)
            with pytest.raises(BlockingIOError):
                for _ in range(10):
                    waiting = ends.enter_context(socket.socket(socket.AF_UNIX))
                    waiting.setblocking(False)
                    waiting.connect(str(path))
            with pytest.raises(GuestFailed, match=r"did not answer within 0\."):
                async with connect(path.parent, Deadline.after(0.3)):
                    pass

    run(main())


def test_who_has_the_monitor_does_not_hold_up_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        async with locked(tmp_path / "monitor.lock"):
            with pytest.raises(GuestFailed, match=r"did not answer within 0\."):
                async with connect(tmp_path, Deadline.after(0.2)):
                    pass

    run(main())


@settings(max_examples=60)
@given(st.binary(max_size=200).map(lambda data: data + b"\n") | REPLY.map(line))
def test_whatever_it_answers_is_an_error_of_ours(said: bytes) -> None:
    from tempfile import TemporaryDirectory

    async def main(folder: Path) -> None:
        async with qemu(folder, lambda _: said) as path:
            with pytest.raises(GuestFailed):
                async with connect(path.parent, Deadline.after(1)) as monitor:
                    await monitor.execute("query-status", timeout=0.05)

    with TemporaryDirectory() as name:
        run(main(Path(name)))


@settings(max_examples=60)
@given(REPLY)
def test_whatever_its_results_are(value: Any) -> None:
    from tempfile import TemporaryDirectory

    async def main(folder: Path) -> None:
        async with (
            qemu(folder, lambda request: done(request, value)) as path,
            connect(path.parent) as monitor,
        ):
            for work in (monitor.members("/"), monitor.human("info"), monitor.ram_address()):
                with contextlib.suppress(GuestFailed):
                    await work

    with TemporaryDirectory() as name:
        run(main(Path(name)))


def plugging(request: dict[str, Any], chardevs: object, error: str = "") -> bytes:
    if request["execute"] == "query-chardev":
        return done(request, chardevs)
    if error and request["execute"] == "device_add":
        refusal = {"class": "GenericError", "desc": error}
        return line({"error": refusal, "id": request["id"]})
    return done(request)


async def nothing() -> None:
    """No program runs."""


@pytest.mark.parametrize(
    "label",
    [
        "exec.../../victim.out",
        "exec./../victim.out",
        "exec.victim.out",
        "exec.0123456789abcdef.out/../../victim.out",
        "exec.\u0661123456789abcdef.out",
        "exec." + "0" * 16,
        "exec.",
        "\0",
    ],
)
def test_a_label_is_no_path(tmp_path: Path, label: str) -> None:
    """A QEMU that was taken over could name files of ours, which root would remove."""
    victims = [tmp_path / "victim", tmp_path / "folder/victim", tmp_path / "folder/exec.victim"]
    (tmp_path / "folder").mkdir()
    for victim in victims:
        victim.touch()

    async def main() -> None:
        async with (
            qemu(tmp_path / "folder", lambda r: plugging(r, [{"label": label}])),
            plugged(tmp_path / "folder", "f" * 16, False, Deadline.after(STUCK), nothing),
        ):
            pass

    run(main())
    assert all(victim.exists() for victim in victims)


def test_ports_of_killed_commands_are_taken_out(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    label = "exec.0123456789abcdef.out"

    def answer(request: dict[str, Any]) -> bytes:
        seen.append(request)
        return plugging(request, [{"label": label, "filename": "x"}])

    async def main() -> None:
        async with (
            qemu(tmp_path, answer),
            plugged(tmp_path, "f" * 16, False, Deadline(), nothing) as ports,
        ):
            assert set(ports) == {"out", "err"}

    run(main())
    removed = [each["arguments"]["id"] for each in seen if each["execute"] == "chardev-remove"]
    assert removed == [label, f"exec.{'f' * 16}.out", f"exec.{'f' * 16}.err"]


def test_who_finds_no_port_waits_for_one(tmp_path: Path) -> None:
    tries: list[None] = []
    free_from = 4
    full = "virtio-serial-bus: Out-of-range port id specified, max. allowed: 30"

    def answer(request: dict[str, Any]) -> bytes:
        tries.extend([None] * (request["execute"] == "device_add"))
        return plugging(request, [], full if len(tries) < free_from else "")

    async def main() -> None:
        nonlocal free_from
        async with qemu(tmp_path, answer):
            async with plugged(tmp_path, "f" * 16, False, Deadline(), nothing) as ports:
                assert set(ports) == {"out", "err"}
            free_from = sys.maxsize
            with pytest.raises(NoSlot, match="no free port"):
                deadline = Deadline.after(1.5)
                async with (
                    deadline.scope(),
                    plugged(tmp_path, "f" * 16, True, deadline, nothing),
                ):
                    pass
        assert [path.name for path in tmp_path.iterdir()] == ["monitor.lock"]

    run(main())


def test_cancelled_at_any_moment_it_leaves_nothing_open(tmp_path: Path) -> None:
    """Nor does it wait: a command that is interrupted ends."""

    async def speak(path: Path) -> None:
        async with connect(path.parent) as monitor:
            await monitor.execute("query-x")

    async def main() -> None:
        async with qemu(tmp_path, silent) as path:
            for moment in range(40):
                task = asyncio.create_task(speak(path))
                await asyncio.sleep(moment * 0.0005)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    began = time.monotonic()
    run(main())
    assert time.monotonic() - began < STUCK / 2
