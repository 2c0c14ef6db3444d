"""Shared by all tests: how a test says that it cannot run here."""

import os
import signal
from typing import NoReturn

import pytest

# Their assertions then say what they compared.
pytest.register_assert_rewrite("tests.unit.store_kit", "tests.crash.state", "tests.crash.campaign")


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start: a shell without job control has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def cannot_run(reason: str) -> NoReturn:
    """Skip the test with ``reason``, or fail it when strict (ONECOPY_STRICT=1)."""
    if os.environ.get("ONECOPY_STRICT") == "1":
        pytest.fail(f"cannot run here: {reason}")
    pytest.skip(reason)
