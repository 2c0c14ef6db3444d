"""onecopy from Python, for asyncio: one host, and the guests that a program starts on it.

What the commands do, by the same code, and no more. `onecopy.sync` has the same in blocking calls.
Wrong input and failures raise the classes of `onecopy.errors`.
"""

from onecopy.aio.guest import Guest
from onecopy.aio.host import Host
from onecopy.aio.options import BootOptions

__all__ = ["BootOptions", "Guest", "Host"]
