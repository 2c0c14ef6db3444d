"""Waiting for many answers, and for none of them for ever."""

import os
import subprocess
import sys
import threading
import time

import pytest

from onecopy.linux import bounded_wait

#: Each answer takes 0.3 s of its process, which is stopped meanwhile for longer than the limit.
STOPPED = """
import os, subprocess, time
from onecopy.linux import bounded_wait
stop = f"sleep 0.1; kill -STOP {os.getpid()}; sleep 1; kill -CONT {os.getpid()}"
def ask(number):
    stopping = subprocess.Popen(["sh", "-c", stop])
    time.sleep(0.3)
    stopping.wait()
    return number
print(bounded_wait.each(ask, [1, 2, 3], lambda _: -1, seconds=0.5))
"""


def test_answers_are_in_order() -> None:
    found = bounded_wait.each(lambda n: n * 2, range(50), lambda _: -1, seconds=60, at_once=4)
    assert found == [n * 2 for n in range(50)]
    assert bounded_wait.each(lambda n: n, [], lambda _: -1, seconds=60) == []


def test_an_error_is_raised() -> None:
    def fails(number: int) -> int:
        return 1 // number

    with pytest.raises(ZeroDivisionError):
        bounded_wait.each(fails, [1, 0, 1], lambda _: -1, seconds=60)


@pytest.mark.parametrize("at_once", [1, 3])
def test_those_who_never_answer_are_left(at_once: int) -> None:
    reading, writing = os.pipe()

    def ask(number: int) -> int:
        if number % 3 == 1:
            os.read(reading, 1)
        return number

    began = time.monotonic()
    found = bounded_wait.each(ask, range(30), lambda _: -1, seconds=0.3, at_once=at_once)
    assert found == [-1 if number % 3 == 1 else number for number in range(30)]
    # The first few have all their time; ten times as long for ten would be 3 s for one thread.
    assert time.monotonic() - began < 10
    os.close(writing)
    os.close(reading)


def test_who_goes_on_is_not_late() -> None:
    def slow(number: int) -> int:
        for _ in range(10):
            time.sleep(0.1)
            bounded_wait.going_on()
        return number

    assert bounded_wait.each(slow, [7], lambda _: -1, seconds=0.7) == [7]
    # Outside it means nothing.
    bounded_wait.going_on()


def test_nobody_is_late_while_this_process_is_stopped() -> None:
    """As on a host that is itself paused, or so busy that this process gets no processor."""
    done = subprocess.run([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "[1, 2, 3]\n"


def test_threads_end() -> None:
    before = threading.active_count()
    bounded_wait.each(lambda n: n, range(10), lambda _: -1, seconds=60, at_once=5)
    until = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < until
        time.sleep(0.01)
