"""The Python API for asyncio: a host, and the guests that a program starts on it.

The API does what the commands do, by the same code. `onecopy.sync` has the same classes with
blocking calls. Wrong input and failures raise the classes of `onecopy.errors`.
"""

from onecopy.aio.guest import Guest
from onecopy.aio.host import Host
from onecopy.aio.options import BootOptions

__all__ = ["BootOptions", "Guest", "Host"]
