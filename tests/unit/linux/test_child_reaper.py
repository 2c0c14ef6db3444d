"""Children are waited for, whatever other processes have of ours. (Linux, epoll(7))"""

import os
import signal
import time
from pathlib import Path

from onecopy.linux import child_reaper


def sleeping() -> int:
    """A child that does nothing until it is killed."""
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    return pid


def wait_until_gone(pid: int) -> None:
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"nobody has waited for {pid}")


def test_a_process_that_was_forked_meanwhile_has_the_descriptors_too() -> None:
    first, last = sleeping(), sleeping()
    child_reaper.adopt(first)
    child_reaper.adopt(last)
    keeps = sleeping()
    try:
        os.kill(first, signal.SIGKILL)
        wait_until_gone(first)
        time.sleep(0.1)  # what is told again would be told now
        os.kill(last, signal.SIGKILL)
        wait_until_gone(last)
    finally:
        os.kill(keeps, signal.SIGKILL)
        os.waitpid(keeps, 0)
