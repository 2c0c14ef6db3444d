"""Put off modules that libraries import at once and that most commands never use.

A command spends most of its time on imports. The command calls `put_off` before it imports a
library. Programs that use onecopy's Python API do not.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import FunctionType, ModuleType
from typing import Any, NotRequired, Required, get_type_hints

#: The flag of functions that `async def` makes (inspect.CO_COROUTINE).
_CO_COROUTINE = 128


class Later(ModuleType):
    """A stand-in that imports its module at the first use of an attribute that is not ``known``."""

    def __init__(self, name: str, known: dict[str, object]) -> None:
        super().__init__(name)
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> object:
        # The import system asks stand-ins for such attributes.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


def _load(name: str) -> ModuleType:
    if isinstance(sys.modules.get(name), Later):
        sys.modules.pop(name, None)
    return importlib.import_module(name)


def _cleandoc(text: str) -> str:
    """Return what inspect.cleandoc() does. click cleans the help of each option at once."""
    if "\n" not in text:
        return text.expandtabs().lstrip()
    cleaned: str = _load("inspect").cleandoc(text)
    return cleaned


def _iscoroutinefunction(found: object) -> bool:
    """Return what inspect.iscoroutinefunction() does. qemu.qmp asks when it is imported."""
    if type(found) is FunctionType:
        return bool(found.__code__.co_flags & _CO_COROUTINE)
    return bool(_load("inspect").iscoroutinefunction(found))


def _system() -> str:
    """Return what platform.system() does on Linux. uuid calls it when it is imported."""
    return os.uname().sysname


#: Module -> what libraries use of it in each command.
_MODULES: dict[str, dict[str, object]] = {
    "inspect": {"cleandoc": _cleandoc, "iscoroutinefunction": _iscoroutinefunction},
    "msgspec.inspect": {},
    "platform": {"system": _system},
    "textwrap": {},
    "tokenize": {},
    # msgspec takes these of typing where the module is not installed.
    "typing_extensions": {
        "NotRequired": NotRequired,
        "Required": Required,
        "get_type_hints": get_type_hints,
    },
}


class _SSLContext:
    """A class for annotations, as in qemu.qmp; its call makes a real context."""

    def __new__(cls, *args: Any) -> Any:
        return _load("ssl").SSLContext(*args)


def put_off_tls() -> None:
    """Put a stand-in in place of the module ssl."""
    sys.modules["ssl"] = Later("ssl", {"SSLContext": _SSLContext})


def put_off() -> None:
    """Put stand-ins in place of modules that are not loaded yet."""
    for name, known in _MODULES.items():
        if name not in sys.modules:
            sys.modules[name] = Later(name, known)
