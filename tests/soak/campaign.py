"""The campaign: waves of clones, and what befalls each wave. After each nothing may be left."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from onecopy.guest.runtime import Runtime
from tests.soak.remains import Remains
from tests.vm.forks import servers

ONECOPY = Path(sys.executable).parent / "onecopy"
#: The saved system as it was made, and the name under which it is replaced and removed.
BASE, SYSTEM = "soak-base", "soak"

Guests = list[dict[str, Any]]


class Campaign:
    """Waves of ``wave`` clones from a saved system BASE, whose application answers on port 80."""

    def __init__(self, host: Runtime, seed: int, wave: int) -> None:
        self._host = host
        self._dice = random.Random(seed)  # noqa: S311 - nothing secret
        self._wave = wave
        self._seconds = 1.0
        """That a wave takes to start; what kills are spread over."""
        self.clones = 0
        """That were asked for."""
        self.waves: Counter[str] = Counter()
        self.killed = 0
        """VMMs, by SIGKILL."""
        self.answers = 0
        self.forked: Counter[str] = Counter()
        """How the VMMs of waves started whose fork servers failed: "forked", or why not."""
        _done("tag", BASE, SYSTEM)
        self._before = Remains.look(host)

    def turn(self, what: str = "") -> None:
        """One wave, and what befalls it: ``what``, or drawn."""
        what = what or self._dice.choice(KINDS)
        getattr(self, f"_{what}")()
        self.waves[what] += 1
        self.clones += self._wave
        # The next command, whichever it is, sweeps.
        assert json.loads(_done("ps", "--json")) == []
        Remains.look(self._host).require(self._before)

    def end(self) -> None:
        """End what runs, whatever state it is in."""
        for record in self._host.guests():
            self._host.end(record)
        self._host.sweep()

    def _stopped(self) -> None:
        """They answer and are stopped."""
        self._ask(self._start())
        _done("stop", "--all", *self._dice.choice([[], ["--now"]]))

    def _dying(self) -> None:
        """Some VMMs are killed; the others answer all the same."""
        guests = self._start()
        self._dice.shuffle(guests)
        dead, alive = guests[::2], guests[1::2]
        for guest in dead:
            os.kill(guest["pid"], signal.SIGKILL)
        self.killed += len(dead)
        self._ask(alive)
        told = {guest["name"] for guest in json.loads(_done("ps", "--json"))}
        assert told == {guest["name"] for guest in alive}
        # They stay known, until they are removed, and nothing else of them.
        known = {each["name"] for each in json.loads(_done("ps", "-a", "--json")) if each["ended"]}
        assert known == {guest["name"] for guest in dead}
        _done("rm", "--ended")
        _done("stop", "--all", "--now")

    def _command_killed(self) -> None:
        """The command is killed while it starts them: they are gone with the next one, or whole."""
        with self._starting() as command:
            time.sleep(self._moment())
            command.kill()
            command.wait()
        left = json.loads(_done("ps", "--json"))
        assert len(left) in (0, self._wave), left
        self._ask(left)
        _done("stop", "--all", "--now")

    def _interrupted(self) -> None:
        """Ctrl-C while they start: none is left, at once. It may come too late."""
        with self._starting() as command:
            time.sleep(self._moment())
            command.send_signal(signal.SIGINT)
            said, complaint = command.communicate()
        if command.returncode == 0:
            self._ask(json.loads(said)["guests"])
            _done("stop", "--all", "--now")
        else:
            assert command.returncode == 130, complaint
            Remains.look(self._host).require(self._before)

    def _replaced(self) -> None:
        """A clone, running on, is saved in place of what it came from; the others answer."""
        guests = self._start()
        _done("save", SYSTEM, "--from", self._dice.choice(guests)["name"])
        self._ask(guests)
        (new,) = self._start(1, "new")
        self._ask([new])
        _done("stop", "--all", "--now")
        _done("tag", BASE, SYSTEM)

    def _removed(self) -> None:
        """What they came from is removed; they answer."""
        guests = self._start()
        _done("rm", "--pending", SYSTEM)
        self._ask(guests)
        _done("stop", "--all", "--now")
        _done("tag", BASE, SYSTEM)

    def _servers_fail(self) -> None:
        """Fork servers are killed, hang or lack descriptors while they start: all answer."""
        with self._starting() as command, ThreadPoolExecutor(1) as one:
            said = one.submit(command.communicate)
            hangs, stopped = self._dice.random() < 0.5, 0
            while not said.done():
                for pid in set(servers(self._host)) - {stopped}:
                    with suppress(ProcessLookupError):
                        if hangs:
                            os.kill(pid, signal.SIGSTOP)
                            hangs, stopped = False, pid
                        elif self._dice.random() < 0.5:
                            os.kill(pid, signal.SIGKILL)
                        else:
                            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
                time.sleep(self._dice.uniform(0.01, 0.2))
            output, complaint = said.result()
        assert command.returncode == 0, complaint
        guests = json.loads(output)["guests"]
        assert all(each["forked"] or each["why_exec"] for each in guests)
        self.forked.update(each["why_exec"] or "forked" for each in guests)
        self._ask(guests)
        _done("stop", "--all", "--now")

    def _start(self, count: int = 0, stem: str = "wave") -> Guests:
        began = time.monotonic()
        guests: Guests = json.loads(_done(*self._run(count, stem)))["guests"]
        if not count:
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
        return guests

    def _run(self, count: int = 0, stem: str = "wave") -> list[str]:
        number = str(count or self._wave)
        return ["run", "-n", number, "--name", stem, "-p", "0:80", "--json", SYSTEM]

    @contextmanager
    def _starting(self) -> Iterator[subprocess.Popen[str]]:
        """The command that starts a wave, and does not read our Ctrl-C."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [ONECOPY, *self._run()], text=True, stdout=pipe, stderr=pipe, start_new_session=True
        ) as command:
            yield command

    def _moment(self) -> float:
        return self._dice.uniform(0.05, 1.2 * self._seconds)

    def _ask(self, guests: Sequence[dict[str, Any]]) -> None:
        """Each answers with its own name."""
        with ThreadPoolExecutor(8) as pool:
            names = list(pool.map(_answer, guests))
        assert names == [guest["name"] for guest in guests]
        self.answers += len(names)


#: What may befall a wave: methods of Campaign.
KINDS = (
    *("stopped", "dying", "command_killed", "interrupted", "replaced", "removed"),
    "servers_fail",
)


def _answer(guest: dict[str, Any]) -> str:
    ((port, _),) = guest["publish"]
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                return str(answer.read().decode().strip())
        except OSError:
            # Many at once on few processors are slow.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _done(*args: str) -> str:
    done = subprocess.run([ONECOPY, *args], capture_output=True, text=True)
    assert done.returncode == 0, f"{args}: {done.returncode} {done.stdout} {done.stderr}"
    return done.stdout
