"""How a test that runs as root sees what another user is told."""

import ctypes
import json
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tests.conftest import cannot_run

NOBODY = 65534
_PR_SET_DUMPABLE = 4


def as_nobody(function: Callable[[], object], groups: Sequence[int] = ()) -> Any:
    """What ``function`` returns (JSON values) in a child process without any privilege.

    ``groups`` are all that it belongs to, besides its own.
    """
    if os.geteuid():
        cannot_run("only root can become someone else")
    reading, writing = os.pipe()
    # Not a new interpreter: another user may not be able to reach this one's files.
    child = os.fork()
    if not child:
        _answer(function, groups, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, answer
    return json.loads(answer)


def _answer(function: Callable[[], object], groups: Sequence[int], writing: int) -> None:
    status = 1
    try:
        os.setgroups(groups)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Becoming another user closed /proc/self to ourselves: prctl(2).
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        os.write(writing, json.dumps(function()).encode())
        status = 0
    except BaseException:
        os.write(writing, traceback.format_exc().encode())
    finally:
        os._exit(status)
