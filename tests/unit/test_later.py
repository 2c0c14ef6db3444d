"""Stand-ins for modules that most commands never use: they behave like the modules themselves.

Each test runs in a Python of its own, because a module that is loaded gets no stand-in. Not here:
which commands import what (cli/test_imports.py).
"""

import inspect
import platform
import subprocess
import sys
from functools import partial

import pytest

from onecopy import later

BEGIN = """
import sys
from onecopy import later
later.put_off()
def real(name):
    return not isinstance(sys.modules[name], later.Later)
"""


def said(program: str) -> str:
    """Return what a program printed after ``BEGIN``."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", BEGIN + program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_a_module_is_loaded_when_something_of_it_is_used() -> None:
    program = """
import textwrap
print(real("textwrap"), textwrap.dedent("  a"), real("textwrap"))
from tokenize import tokenize
print(tokenize is sys.modules["tokenize"].tokenize, real("tokenize"))
"""
    assert said(program).splitlines() == ["False a True", "True True"]


def test_what_libraries_use_at_once_does_not_load_a_module() -> None:
    program = """
import inspect, platform, uuid, click
async def one(): pass
print(inspect.cleandoc(" a b "), platform.system(), inspect.iscoroutinefunction(one))
print(real("inspect"), real("platform"))
"""
    assert said(program).splitlines() == ["a b  Linux True", "False False"]


def test_attributes_that_are_missing_are_told_as_ever() -> None:
    program = """
import textwrap
try: textwrap.nothing
except AttributeError as error: print(error)
try: from inspect import nothing
except ImportError as error: print(type(error).__name__)
print(hasattr(textwrap, "__nothing__"))
"""
    expected = ["module 'textwrap' has no attribute 'nothing'", "ImportError", "False"]
    assert said(program).splitlines() == expected


def test_a_loaded_module_stays() -> None:
    before = sys.modules["inspect"]
    later.put_off()
    assert sys.modules["inspect"] is before


def test_a_tls_context_is_a_real_one() -> None:
    program = """
from onecopy.cli.event_loop import asyncio
from ssl import SSLContext
print(real("ssl"))
context = SSLContext()
import ssl
print(real("ssl"), isinstance(context, ssl.SSLContext))
"""
    assert said("import warnings; warnings.simplefilter('ignore')" + program).splitlines() == [
        "False",
        "True True",
    ]


@pytest.mark.parametrize("text", ["", " ", "a", "  a\tb ", "a\n  b\n   c", "\n a\n\n", "\ta"])
def test_help_is_cleaned_as_inspect_does(text: str) -> None:
    assert later._cleandoc(text) == inspect.cleandoc(text)


def test_the_system_is_that_of_platform() -> None:
    assert later._system() == platform.system()


def test_coroutine_functions_are_told_as_inspect_does() -> None:
    async def one() -> None: ...

    for each in (one, said, print, later.Later, partial(one)):
        assert later._iscoroutinefunction(each) == inspect.iscoroutinefunction(each)
