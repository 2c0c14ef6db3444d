"""From what Python raises to an error of ours: every command's last net.

Errors are best told where they arise, with what to do; what comes here was foreseen by nobody. Not
here: what the user sees of it (cli/__init__.py).
"""

from __future__ import annotations

import errno
import os
import resource
import traceback
from pathlib import Path

from onecopy.errors import HostFailed, InvalidInput, NotFound, NotPermitted, OnecopyError

_HINT = "`onecopy --debug COMMAND` shows where it happened"


def explained(error: BaseException) -> OnecopyError:
    """An error of ours that says what ``error`` means for the user."""
    if isinstance(error, OnecopyError):
        return error
    if isinstance(error, BaseExceptionGroup):
        # What failed first; the others may be due to it.
        return explained(error.exceptions[0])
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError):
        return HostFailed(
            "this command got no more memory",
            hint="free some memory, or raise its limit: ulimit -v, the service's MemoryMax=",
        )
    if isinstance(error, UnicodeError):
        return InvalidInput(
            f"something that was given is not UTF-8: {error}",
            hint=f"give a name or text without such bytes; {_HINT}",
        )
    return OnecopyError(
        f"internal error: {type(error).__name__}: {error} ({_place(error)})",
        hint=f"this is a bug of onecopy: {_HINT}, for a report of it",
    )


def _of_system(error: OSError) -> OnecopyError:
    said = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        said += f": {os.fsdecode(error.filename)!r}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return HostFailed(
            f"too many open files: this command may have {limit} at once",
            hint=f"raise the limit, which may be up to {most}: ulimit -n {min(1024, most)}",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostFailed(said, hint="free some space there: `onecopy ls`, `onecopy rm`")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return NotPermitted(said, hint=f"become a user who may do that; {_HINT}")
    if isinstance(error, FileNotFoundError) and not _has_folder():
        return NotFound("the working directory was deleted", hint="cd to a folder that is there")
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
