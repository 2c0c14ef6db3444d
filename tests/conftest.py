"""Shared by all tests: how a test says that it cannot run here."""

import os
import signal
from typing import NoReturn

import pytest
from hypothesis import settings


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start: a shell without job control has it ignored.

    No property has a deadline: a busy machine is no fault.
    """
    settings.register_profile("onecopy", deadline=None)
    settings.load_profile("onecopy")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def cannot_run(reason: str) -> NoReturn:
    """Skip the test with ``reason``, or fail it when strict (ONECOPY_STRICT=1)."""
    if os.environ.get("ONECOPY_STRICT") == "1":
        pytest.fail(f"cannot run here: {reason}")
    pytest.skip(reason)
