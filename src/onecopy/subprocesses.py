"""The one door to external programs.

Every program but QEMU (whose process outlives us: vmm/spawn.py) is started here: standard input
is /dev/null, the environment is rebuilt, a missing program names its package, a failure carries a
command line that one can paste.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from onecopy.errors import CommandFailed, MissingProgram

#: Program -> the Debian package that has it.
PACKAGES = {
    "apt-get": "apt",
    "blkid": "util-linux",
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
    "nft": "nftables",
    "partx": "util-linux",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "resize2fs": "e2fsprogs",
    "setpriv": "util-linux",
    "tar": "tar",
    "unshare": "util-linux",
    "xz": "xz-utils",
    "zstd": "zstd",
}

#: A kill -9 of us takes the program along (prctl(2), PR_SET_PDEATHSIG).
_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")
#: Bytes that a program may print, and that are kept of what it says on standard error.
_MOST_OUT, _MOST_ERR = 64 << 20, 256 << 10
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
    hint: str = "",
    both: bool = False,
) -> str:
    """Run a program to its end and return what it printed on standard output.

    With ``both`` standard error comes before it. What it prints is bounded: not for programs that
    read foreign data (vmm/confined_tool.py).

    It runs in a process group of its own, which is ended when we are interrupted: no child
    outlives the call. Raises MissingProgram, or CommandFailed with both of its streams.
    """
    args = [find_program(os.fspath(argv[0])), *(os.fspath(a) for a in argv[1:])]
    process = subprocess.Popen(
        [*_WITH_US, *args],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        # What a program makes must not depend on who runs us.
        umask=0o022,
    )
    out, err = bytearray(), bytearray()
    try:
        _exchange(process, stdin or b"", out, err)
    except _TooMuch as error:
        _end_group(process)
        output, limit = err.decode(errors="replace"), ("output", f"{_MOST_OUT >> 20} MiB")
        raise CommandFailed(shlex.join(args), -signal.SIGKILL, output, limit=limit) from error
    except BaseException:
        _end_group(process)
        raise
    if process.returncode:
        output = (err + b"\n" + out).decode(errors="replace")
        raise CommandFailed(shlex.join(args), process.returncode, output, hint=hint)
    return (err + out if both else out).decode(errors="replace")


class _TooMuch(Exception):
    """It prints more than is kept."""


def _exchange(
    process: subprocess.Popen[bytes], stdin: bytes, out: bytearray, err: bytearray
) -> None:
    """Give it ``stdin`` and read both of its streams until it ends; raise _TooMuch."""
    assert process.stdout and process.stderr  # noqa: S101 - for the type checker
    todo, streams = memoryview(stdin), {process.stdout: out, process.stderr: err}
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        if process.stdin:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            for key, _ in selector.select():
                if key.fileobj is process.stdin:
                    todo = _give(process.stdin, todo)
                    if not todo:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                data = os.read(key.fd, 64 << 10)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout and len(out) + len(data) > _MOST_OUT:
                    raise _TooMuch
                else:
                    kept = out if key.fileobj is process.stdout else err
                    keep(kept, data, None if kept is out else _MOST_ERR)
    for stream in streams:
        stream.close()
    process.wait()


def _give(pipe: IO[bytes], data: memoryview) -> memoryview:
    """Write what a pipe takes; return the rest, which is nothing if nobody reads it any more."""
    try:
        return data[os.write(pipe.fileno(), data[: 64 << 10]) :] if data else data
    except BrokenPipeError:
        return data[:0]


def keep(kept: bytearray, data: bytes, most: int | None) -> None:
    """Add ``data``; of more than twice ``most`` bytes only the beginning and the end stay."""
    kept += data
    if most and len(kept) > 2 * most:
        kept[most // 2 : -most // 2] = b"\n[...]\n"


async def run_shell(command: str, env: Mapping[str, str]) -> tuple[int, str]:
    """Run a user's own command, in their environment and ``env``: exit code, and what it printed.

    Ended as in `run` when we are interrupted.
    """
    import asyncio

    # Started by this thread, with which it ends (PR_SET_PDEATHSIG).
    process = subprocess.Popen(  # noqa: ASYNC220
        [*_WITH_US, "sh", "-c", command],
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        said, _ = await asyncio.to_thread(process.communicate)
    except BaseException:
        _end_group(process)
        raise
    return process.returncode, said.decode(errors="replace").strip()


class Detached:
    """A program of ours that outlives us, in a session of its own; a context manager.

    It inherits ``pass_fds``. At the end of the ``with`` it is ended, unless it is kept.
    """

    def __init__(self, argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
        paths = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
        self._process = subprocess.Popen(
            argv,
            cwd="/",
            env=environment(paths),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, question: bytes) -> bytes:
        """Give it ``question`` on standard input; what it says until it closes standard output."""
        assert self._process.stdin and self._process.stdout  # noqa: S101 - for the type checker
        try:
            self._process.stdin.write(question)
            self._process.stdin.close()
        except BrokenPipeError:
            return b""
        return self._process.stdout.read()

    def keep(self) -> None:
        """Let it live on."""
        # So that nobody waits for it, or warns that nobody does.
        self._process.returncode = 0

    def __enter__(self) -> Detached:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


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
