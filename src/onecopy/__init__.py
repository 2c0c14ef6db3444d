"""onecopy: one copy in memory of every page that QEMU/KVM guests share.

The Python API does what the command does. A saved system (`onecopy save`, or `Host.save`) starts
any number of guests, each in some hundredths of a second::

    import onecopy

    with onecopy.Host() as host:
        with host.start("hello", 2, publish=[(0, 80)]) as guests:
            for guest in guests:
                guest.copy_in("tests", "/work")
                done = guest.exec(["python3", "-m", "unittest", "discover", "/work"], timeout=60)
                print(guest.name, guest.port(80), done.text)
                guest.copy_out("/work/report.xml", f"report-{guest.name}.xml")

The guests end with their block, also after an error in it. `Host.boot` boots guests from a segment
instead. `Host.guests` returns all running guests. `Guest.keep` lets a guest outlive the program.

All errors are subclasses of `OnecopyError` (`onecopy.errors`): each has a message and a ``hint``. A
program that fails in a guest raises `ProgramFailed`, unless ``check=False`` is given.

`onecopy.aio` has the same classes for asyncio. docs/python.md shows more.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onecopy import aio as aio
    from onecopy import errors as errors
    from onecopy.errors import OnecopyError as OnecopyError
    from onecopy.errors import ProgramFailed as ProgramFailed
    from onecopy.guest.exec import Completed as Completed
    from onecopy.sync import Guest as Guest
    from onecopy.sync import Host as Host

__version__ = "0.1.0"

#: Modules of the public names. Each is imported at its first use, so that the command starts fast.
_PLACES = {
    "Completed": "onecopy.guest.exec",
    "Guest": "onecopy.sync",
    "Host": "onecopy.sync",
    "OnecopyError": "onecopy.errors",
    "ProgramFailed": "onecopy.errors",
}
_MODULES = ("aio", "errors")


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name in _MODULES:
        return import_module(f"onecopy.{name}")
    raise AttributeError(f"module 'onecopy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PLACES, *_MODULES]
