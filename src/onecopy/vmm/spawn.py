"""Starting a confined program, which inherits what it is given and nothing else.

Not here: what it may (confine.py), what it is (launch.py, accel.py).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible
from onecopy.host.syscall import (
    PR_GET_DUMPABLE,
    PR_GET_MEMORY_MERGE,
    PR_GET_THP_DISABLE,
    PR_SET_DUMPABLE,
    PR_SET_MEMORY_MERGE,
    PR_SET_THP_DISABLE,
    prctl,
)
from onecopy.run import environment
from onecopy.vmm.confine import Confinement, enter, ruleset

#: What QEMU allocates in blocks of some size, mostly queues of virtio devices, it hardly touches:
#: as mappings of their own untouched pages take no memory. One arena holds the rest of all threads.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=16384"}

#: What children inherit is set for the whole process: with two starts at once one VMM would get,
#: and so keep, the lease of the other's.
alone = threading.Lock()


class Started(msgspec.Struct, frozen=True):
    """A confined process, and where its questions come in if it asks."""

    process: subprocess.Popen[bytes]
    listener: int | None


def start(
    argv: Sequence[str], confinement: Confinement, folder: Path, output: int, passed: Sequence[int]
) -> Started:
    """Start a program that works in ``folder`` and writes to ``output``, confined.

    It inherits the descriptors ``passed`` and no other. Raises Incompatible if this host cannot
    confine it.

    Credentials, filters and rulesets belong to a thread, and a child has those of the thread that
    made it. So a thread of ours confines itself, starts the program and ends: no code of ours runs
    in a copy of this process, which takes longer the larger it is and is unsafe with other threads.
    """
    with alone, ExitStack() as ends, ThreadPoolExecutor(1) as one:
        rules = ruleset(argv[0], confinement)
        if rules:
            ends.callback(rules.close)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        ends.callback(os.close, null)
        ends.enter_context(inherited_only(passed))
        ends.enter_context(inherited_attributes())
        if confinement.merge:
            ends.enter_context(_mergeable())

        def work() -> Started:
            listener = enter(confinement, rules, folder)
            if listener is not None:
                # It can be asked of the VMM as long as that lives.
                os.set_inheritable(listener, True)
            try:
                process = _spawn(argv, null, output)
            except BaseException:
                if listener is not None:
                    os.close(listener)
                raise
            if listener is not None:
                os.set_inheritable(listener, False)
            return Started(process, listener)

        return one.submit(work).result()


def _spawn(argv: Sequence[str], null: int, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=null,
        stdout=output,
        stderr=output,
        env=environment(_ENVIRONMENT),
        # What is inherited is set already.
        close_fds=False,
        start_new_session=True,
    )


@contextmanager
def inherited_only(passed: Sequence[int]) -> Iterator[None]:
    """Let new children inherit the standard descriptors and ``passed``, and no other."""
    # Popen's own closing lists /proc/self/fd in the child, which is confined by then.
    before = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            before[int(entry.name)] = os.get_inheritable(int(entry.name))
    change = {fd: fd in passed for fd in before if fd > 2 and before[fd] != (fd in passed)}
    try:
        for fd, inherit in change.items():
            os.set_inheritable(fd, inherit)
        yield
    finally:
        for fd in change:
            os.set_inheritable(fd, before[fd])


@contextmanager
def inherited_attributes() -> Iterator[None]:
    """Have what is the whole process's, and passes on to children, as QEMU should have it.

    No huge pages: QEMU asks for them for guest RAM and for its translation buffer, and a small
    guest would then occupy memory that it never touches. And back: a thread that becomes another
    user makes its process undumpable (PR_SET_DUMPABLE(2const)).
    """
    huge, dumpable = prctl(PR_GET_THP_DISABLE), prctl(PR_GET_DUMPABLE)
    prctl(PR_SET_THP_DISABLE, 1)
    try:
        yield
    finally:
        prctl(PR_SET_THP_DISABLE, huge)
        if dumpable == 1:
            prctl(PR_SET_DUMPABLE, 1)


@contextmanager
def _mergeable() -> Iterator[None]:
    """Let new children have all their memory open to KSM (PR_SET_MEMORY_MERGE(2const))."""
    try:
        before = prctl(PR_GET_MEMORY_MERGE)
        prctl(PR_SET_MEMORY_MERGE, 1)
    except OSError as error:
        raise Incompatible(
            "this kernel does not let KSM merge QEMU's own memory",
            hint="that takes Linux 6.4 with KSM; start the guests without --ksm all",
        ) from error
    try:
        yield
    finally:
        prctl(PR_SET_MEMORY_MERGE, before)
