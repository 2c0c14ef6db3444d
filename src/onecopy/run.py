"""The one door to external programs.

Every program but QEMU (whose process outlives us: vmm/spawn.py) is started here: standard input
is /dev/null, the environment is rebuilt, a missing program names its package, a failure carries a
command line that one can paste.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from onecopy.errors import CommandFailed, MissingProgram

#: Program -> the Debian package that has it.
PACKAGES = {
    "apt-get": "apt",
    "busybox": "busybox-static",
    "bzip2": "bzip2",
    "cpio": "cpio",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "dump.erofs": "erofs-utils",
    "fsck.erofs": "erofs-utils",
    "e2fsck": "e2fsprogs",
    "mke2fs": "e2fsprogs",
    "mkfs.erofs": "erofs-utils",
    "mmdebstrap": "mmdebstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "tar": "tar",
    "xz": "xz-utils",
    "zstd": "zstd",
}

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KEPT = ("HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy", "APT_CONFIG")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment programs get: a fixed PATH, the C locale, and little else."""
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    return {"PATH": _PATH, "LC_ALL": "C.UTF-8", "TZ": "UTC", **kept, **(extra or {})}


def find_program(program: str) -> str:
    """Full path of ``program``; raise MissingProgram."""
    found = shutil.which(program, path=_PATH)
    if not found:
        raise MissingProgram(program, PACKAGES.get(program, program))
    return found


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    pass_fds: Sequence[int] = (),
    hint: str = "",
) -> str:
    """Run a program to its end and return what it printed on standard output.

    It runs in a process group of its own, which is ended when we are interrupted: no child
    outlives the call. Raises MissingProgram, or CommandFailed with both of its streams.
    """
    args = [find_program(os.fspath(argv[0])), *(os.fspath(a) for a in argv[1:])]
    process = subprocess.Popen(
        # A kill -9 of us takes the program along (prctl(2), PR_SET_PDEATHSIG).
        ["setpriv", "--pdeathsig", "TERM", "--", *args],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
        process_group=0,
        # What a program makes must not depend on who runs us.
        umask=0o022,
    )
    try:
        out, err = process.communicate(stdin)
    except BaseException:
        _end_group(process)
        raise
    if process.returncode:
        output = (err + b"\n" + out).decode(errors="replace")
        raise CommandFailed(shlex.join(args), process.returncode, output, hint=hint)
    return out.decode(errors="replace")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end (mmdebstrap unmounts what it mounted), then make it."""
    for sig, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()
