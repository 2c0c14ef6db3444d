"""The campaign: draw a job, kill it, open the store, and look at every byte.

A store lives through the whole campaign. Beside the job there are guests that hold something, and
now and then another command that must not be disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from onecopy.linux.syscall import prctl
from onecopy.model import Reference
from onecopy.store import Lease, NewLayer, Store
from tests.crash import state
from tests.crash.jobs import BESIDE, KINDS, Job, Maker
from tests.crash.state import State

_MOST_GUESTS = 3
#: prctl(2)
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Tally:
    """What became of the jobs of one kind."""

    killed: int = 0
    finished: int = 0
    old: int = 0
    """Killed, and nothing had changed."""
    new: int = 0
    """Killed, and all was done."""
    remains: int = 0
    """Killed, and something was left for the next command to sweep."""
    seconds: float = 0.05
    """That a job takes; what kills are spread over."""


@dataclass
class Guest:
    """A process that holds leases, as a VMM does."""

    process: subprocess.Popen[bytes]
    files: set[str]
    """What it has in leases/."""
    blobs: set[str] = field(default_factory=set)

    def end(self) -> None:
        """Kill it, as guests end."""
        self.process.kill()
        self.process.wait()


class Campaign:
    """Kills commands that change the store ``folder/store`` until it is told to stop."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._root = folder / "store"
        self._log = folder / "log"
        self._dice = random.Random(seed)  # noqa: S311 - nothing secret
        outside = folder / "outside"
        outside.mkdir()
        os.environ["ONECOPY_HOME"] = str(self._root)
        Store(self._root)
        self._maker = Maker(self._root, outside, self._dice)
        self._state = State()
        self._guests: list[Guest] = []
        self._turns = 0
        # Programs that a killed command has started become children of this process.
        _set_subreaper(True)
        self.tally = {kind: Tally() for kind in KINDS}
        self.guests_ended = 0
        self.most_pending = 0

    @property
    def kills(self) -> int:
        """How many jobs were killed."""
        return sum(each.killed for each in self.tally.values())

    def turn(self) -> None:
        """One job, killed unless it is done before; then the store must be right."""
        self._turns += 1
        self._change_guests()
        kind = self._dice.choice(KINDS)
        job = self._maker.job(kind, self._state)
        if job is None:
            return
        tally = self.tally[kind]
        other = self._start(self._bystander) if self._dice.random() < 0.2 else None
        killed = self._kill(job, tally)
        self._await_orphans(other)
        if other is not None:
            self._require_done(other)
            job = Job(job.run, self._beside(job.after))
            self._state = self._beside(self._state)
        tally.remains += killed and state.leftovers(self._root) > 0
        self._check(kind, job, killed=killed)

    def end(self) -> None:
        """End the guests, remove all names: then nothing may be left."""
        for guest in self._guests:
            guest.end()
        self._guests.clear()
        store = Store(self._root)
        for artifact in store.artifacts():
            store.verify(artifact)
        for artifact in store.artifacts():
            store.remove(Reference.parse(artifact.ref))
        assert state.check(self._root, set(), set()) == State()
        assert list((self._root / "live").iterdir()) == []

    def abandon(self) -> None:
        """End the processes that were started, whatever state the store is in."""
        for guest in self._guests:
            guest.end()
        _set_subreaper(False)

    def _kill(self, job: Job, tally: Tally) -> bool:
        began = time.monotonic()
        child = self._start(job.run)
        wait = self._dice.random() * 1.3 * tally.seconds
        while time.monotonic() - began < wait:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            tally.killed += 1
            # Else only the fast ones would count.
            tally.seconds += 0.2 * max(0.0, wait - tally.seconds)
            return True
        self._require(status)
        tally.finished += 1
        tally.seconds += 0.2 * (time.monotonic() - began - tally.seconds)
        return False

    def _check(self, kind: str, job: Job, *, killed: bool) -> None:
        Store(self._root)
        leases = {name for guest in self._guests for name in guest.files}
        held = {digest for guest in self._guests for digest in guest.blobs}
        found = state.check(self._root, leases, held)
        tally = self.tally[kind]
        if found == job.after:
            tally.new += killed
        else:
            assert killed, f"{kind} ended well and did not do what it should: {found}, {job.after}"
            assert found == self._state, f"{kind}: {found} is neither {self._state} nor {job.after}"
            tally.old += 1
        if self._state == job.after:
            # There was nothing to change for good: then it is neither.
            tally.new -= killed
        self._state = found
        self.most_pending = max(self.most_pending, len(Store(self._root).pending()))

    def _change_guests(self) -> None:
        # What an ended guest leaves is still there when the job begins.
        if self._guests and self._dice.random() < 0.3:
            self._guests.pop(self._dice.randrange(len(self._guests))).end()
            self.guests_ended += 1
        elif len(self._guests) < _MOST_GUESTS and self._state.refs and self._dice.random() < 0.5:
            self._guests.append(self._guest())

    def _guest(self) -> Guest:
        store = Store(self._root)
        one, other = (self._dice.choice(store.artifacts()) for _ in range(2))
        name = f"web-{self._turns}"
        main, further = store.hold([one.digest], name), store.extend(name, [other.digest])
        (main.files / "blob").hardlink_to(other.layers[0].path)
        process = subprocess.Popen(["/bin/sleep", "100000"], pass_fds=[main.fd, further.fd])
        leases: list[Lease] = [main, further]
        for lease in leases:
            lease.close()
        return Guest(
            process,
            {main.path.name, further.path.name, main.files.name},
            {*main.record.blobs, *further.record.blobs},
        )

    def _bystander(self) -> None:
        store = Store(self._root)
        with store.workspace() as work:
            (work / "layer").write_bytes(b"beside TAG-00000000")
            layers = [NewLayer(work / "layer", "application/vnd.onecopy.test.v1")]
            store.put("segment", Reference.parse(BESIDE), b"{}", layers)

    def _beside(self, before: State) -> State:
        return before.bound(BESIDE, frozenset({"TAG-00000000"}), {})

    def _start(self, run: Callable[[], object]) -> int:
        """The pid of a process, with a group of its own, that does it; status 0: it is done."""
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            os.setsid()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run()
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _await_orphans(self, other: int | None) -> None:
        """Wait until the programs that a killed command has started are gone, too.

        They have process groups of their own. One that has not come to its exec(2) yet still has
        the command's locks.
        """
        ours = {guest.process.pid for guest in self._guests} | {other}
        while orphans := _children() - ours:
            os.waitpid(orphans.pop(), 0)

    def _require_done(self, child: int) -> None:
        self._require(os.waitpid(child, 0)[1])

    def _require(self, status: int) -> None:
        assert status == 0, f"a job failed that was not killed:\n{self._log.read_text()}"


def _set_subreaper(on: bool) -> None:
    prctl(_PR_SET_CHILD_SUBREAPER, on)


def _children() -> set[int]:
    """The pids of this process's children, zombies too (proc(5), /proc/PID/task/TID/children)."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def total(tallies: dict[str, Tally]) -> Counter[str]:
    """Sums over all kinds."""
    found: Counter[str] = Counter()
    for each in tallies.values():
        found.update(
            killed=each.killed,
            finished=each.finished,
            old=each.old,
            new=each.new,
            remains=each.remains,
        )
    return found
