"""Shared by all tests: how a test says that it cannot run here."""

import os
from typing import NoReturn

import pytest


def cannot_run(reason: str) -> NoReturn:
    """Skip the test with ``reason``, or fail it when strict (ONECOPY_STRICT=1)."""
    if os.environ.get("ONECOPY_STRICT") == "1":
        pytest.fail(f"cannot run here: {reason}")
    pytest.skip(reason)
