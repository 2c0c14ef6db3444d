"""A guest whose agent lies: each lie is an error about that guest, in time and in bounds.

The guest is real, and so is the port; the agent on it is ours (liar.py). Not here: replies of every
kind and all byte streams (tests/unit/vmm/test_guest_reply.py), QEMUs that do not answer
(test_stopped_vmm.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy.errors import AgentFailed, OnecopyError, TooLarge
from onecopy.guest.exec import TIMED_OUT, run_captured, run_streaming
from onecopy.guest.exec_streams import Streams
from onecopy.guest.lifecycle import stop
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.transfer import copy
from onecopy.guest.transfer.tar import Limits
from onecopy.model import MIB
from onecopy.store import Artifact
from onecopy.vmm.agent import Agent
from tests.command import onecopy, refused
from tests.hostile.lies import HONEST, SLOW, WRONG, Mode, always, line, raw, status, to
from tests.vm.conftest import Clones, RunIn, vmms
from tests.vm.guests import open_guests

LIAR = (Path(__file__).parent / "liar.py").read_text()
#: Seconds that a command is given, those that it may take beyond, and what would be stuck.
ASKED, BEYOND, STUCK = 3.0, 2.0, 120.0


def become_liar(host: Runtime, *guests: GuestRecord) -> None:
    """Have our agent in place of the real one."""
    for guest in guests:
        argv = ["python3", "-c", LIAR]
        assert asyncio.run(run_captured(host.run / guest.name, argv, timeout=STUCK)).exit_code == 0
    for guest in guests:
        tell(host, guest, always(HONEST))


def tell(host: Runtime, guest: GuestRecord, mode: Mode) -> None:
    """What lies it is to tell from now on."""
    agent, deadline = Agent(host.run / guest.name), time.monotonic() + STUCK
    while True:
        # The real one knows no such command.
        with contextlib.suppress(AgentFailed):
            assert asyncio.run(agent.call("lie", dict, mode=mode, timeout=3)) == {"liar": True}
            return
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def liar(host: Runtime, saved: Artifact) -> Iterator[GuestRecord]:
    """One guest with our agent."""
    with open_guests() as guests:
        guest = guests.clone(saved)[0].record
        become_liar(host, guest)
        yield guest


@contextlib.contextmanager
def in_bounds(asked: float = ASKED) -> Iterator[None]:
    """At most two seconds more than was asked for, and no more memory than that of some answers."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < asked + BEYOND
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def told(error: OnecopyError) -> str:
    """What a command would print of it; a terminal can take it."""
    text = f"{error.message}{error.hint}"
    assert text.isprintable()
    assert len(text) < 1000
    return text


@pytest.mark.parametrize("name", WRONG)
def test_exec_of_a_lie_is_an_error(host: Runtime, liar: GuestRecord, name: str) -> None:
    tell(host, liar, WRONG[name])
    folder = host.run / liar.name
    with in_bounds(), pytest.raises(AgentFailed) as caught:
        asyncio.run(run_captured(folder, ["true"], timeout=ASKED))
    told(caught.value)


@pytest.mark.parametrize("name", ["lists in lists", "no UTF-8", "5,000 digits", "many lines"])
def test_other_commands_fail_as_well(
    host: Runtime, liar: GuestRecord, tmp_path: Path, name: str
) -> None:
    tell(host, liar, WRONG[name])
    folder = host.run / liar.name
    with in_bounds():
        for work in (
            copy.copy_out(folder, "/etc/passwd", tmp_path / "copy"),
            copy.copy_in(folder, __file__, "/tmp"),
        ):
            with pytest.raises(AgentFailed) as caught:
                asyncio.run(work)
            told(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_who_says_nothing_takes_no_more_than_its_time(host: Runtime, liar: GuestRecord) -> None:
    for name in ("half an answer", "silence"):
        tell(host, liar, SLOW[name])
        with in_bounds(), pytest.raises(AgentFailed, match="did not answer within 3 s") as caught:
            asyncio.run(run_captured(host.run / liar.name, ["true"], timeout=ASKED))
        told(caught.value)


def test_a_program_that_never_ends_is_killed_in_time(host: Runtime, liar: GuestRecord) -> None:
    streams = Streams(lambda _: None, lambda _: None)
    for name in ("it never ends", "stdout without end", "stderr without end"):
        tell(host, liar, SLOW[name])
        with in_bounds():
            code = asyncio.run(
                run_streaming(host.run / liar.name, ["true"], streams, timeout=ASKED)
            )
        assert code == TIMED_OUT


def test_what_is_kept_is_bounded(host: Runtime, liar: GuestRecord, tmp_path: Path) -> None:
    folder = host.run / liar.name
    tell(host, liar, SLOW["stdout without end"])
    with in_bounds(STUCK), pytest.raises(TooLarge, match=r"more than 1\.0 MiB"):
        asyncio.run(run_captured(folder, ["true"]))
    tell(host, liar, SLOW["stderr without end"])
    with in_bounds(STUCK), pytest.raises(TooLarge, match=r"more than 16\.0 MiB"):
        asyncio.run(copy.copy_out(folder, "/etc/passwd", tmp_path / "copy"))
    assert list(tmp_path.iterdir()) == []


def test_an_end_that_is_none(host: Runtime, liar: GuestRecord) -> None:
    gone = line({"error": {"desc": "failed: No such file or directory"}})
    tell(
        host,
        liar,
        [
            ("guest-exec", {"ports": "tag"}),
            ("guest-file-open", gone),
            *status({"exited": True, "exitcode": 7}),
        ],
    )
    done = asyncio.run(run_captured(host.run / liar.name, ["true"], timeout=STUCK))
    assert done.exit_code == 7
    assert done.stdout.startswith(b"all\0 \xff of it")


def test_a_copy_has_its_limits(host: Runtime, liar: GuestRecord, tmp_path: Path) -> None:
    tell(host, liar, always(HONEST))
    folder = host.run / liar.name
    with pytest.raises(TooLarge, match=r"exceeds 1\.0 MiB") as caught:
        asyncio.run(copy.copy_out(folder, "/usr/bin", tmp_path / "copy", Limits(size=MIB)))
    assert "--max-size" in told(caught.value)
    with pytest.raises(TooLarge, match="more than 3 files") as caught:
        asyncio.run(copy.copy_out(folder, "/usr/bin", tmp_path / "copy", Limits(files=3)))
    assert "--max-files" in told(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_stop_ends_each_whatever_it_says(host: Runtime, clones: Clones, run_in: RunIn) -> None:
    lies = ["error 1", "a line without end"]
    good, *evil = clones(1 + len(lies))
    become_liar(host, *evil)
    for guest, name in zip(evil, lies, strict=True):
        tell(host, guest, WRONG[name])
    assert run_in(good, "true").exit_code == 0
    names = [evil[0].name, good.name, *(guest.name for guest in evil[1:])]
    done = onecopy("stop", *names)
    assert done.stderr == ""
    said = done.stdout.splitlines()
    assert [each.split(" ")[0] for each in said] == names
    assert f"{good.name} {stop.Ending.SHUT_DOWN.value}" in said
    assert not {guest.pid for guest in (good, *evil)} & set(vmms(host))


def test_the_command_says_it_in_one_line(host: Runtime, liar: GuestRecord) -> None:
    for name in ("terminal escapes", "objects in objects"):
        tell(host, liar, WRONG[name])
        said = refused(125, "exec", "--timeout", str(ASKED), liar.name, "true")
        assert all(part.isprintable() for part in said.splitlines())
    refused(12, "cp", f"{liar.name}:/etc/passwd", os.devnull)
    tell(host, liar, to("guest-exec", raw(b"{}\n")))
