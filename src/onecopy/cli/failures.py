"""Turns any exception of Python into an OnecopyError, as the last step of every command.

Code that expects an error raises an OnecopyError with a hint itself; only unexpected exceptions
come here. Not here: printing the error (cli/__init__.py).
"""

from __future__ import annotations

import errno
import os
import resource
import traceback
from pathlib import Path

from onecopy.errors import HostFailed, InvalidInput, NotFound, NotPermitted, OnecopyError
from onecopy.linux.statfs import is_full

_HINT = "`onecopy --debug COMMAND` shows a traceback"


def explained(error: BaseException) -> OnecopyError:
    """Return the OnecopyError that explains ``error`` to the user."""
    if isinstance(error, OnecopyError):
        return error
    if isinstance(error, BaseExceptionGroup):
        # The first failure may have caused the others.
        return explained(error.exceptions[0])
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError):
        return HostFailed(
            "the command ran out of memory",
            hint="free some memory, or raise its limit: ulimit -v, the service's MemoryMax=",
        )
    if isinstance(error, UnicodeError):
        return InvalidInput(
            f"an argument or name is not valid UTF-8: {error}",
            hint=f"use a name or text in UTF-8; {_HINT}",
        )
    return OnecopyError(
        f"internal error: {type(error).__name__}: {error} ({_place(error)})",
        hint=f"this is a bug in onecopy; report it with its traceback: {_HINT}",
    )


def _of_system(error: OSError) -> OnecopyError:
    said = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        said += f": {os.fsdecode(error.filename)!r}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return HostFailed(
            f"too many open files: the limit of this command is {limit}",
            hint=f"raise the limit, at most to {most}: ulimit -n {min(1024, most)}",
        )
    if is_full(error):
        return HostFailed(said, hint="free disk space: `onecopy rm` removes images")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return NotPermitted(said, hint=f"run the command as a user with that permission; {_HINT}")
    if isinstance(error, FileNotFoundError) and not _has_folder():
        return NotFound(
            "the working directory was deleted", hint="change to a directory that exists"
        )
    return HostFailed(said, hint=_HINT)


def _has_folder() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "onecopy" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
