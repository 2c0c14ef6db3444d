"""Start external programs: all except QEMU.

Each program gets /dev/null as standard input and a clean environment. The error for a missing
program names its Debian package. The error for a failed one has a command line that can be pasted
into a shell.

Not here: QEMU, which outlives the command that starts it (vmm/spawn.py).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from onecopy.errors import CommandFailed, MissingProgram

#: Program -> the Debian package that contains it.
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

#: If this process is killed, the kernel ends the program too (prctl(2), PR_SET_PDEATHSIG).
_END_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM", "--")
#: Limits in bytes: what a program may print, and how much of its standard error is kept.
_OUTPUT_LIMIT, _STDERR_LIMIT = 64 << 20, 256 << 10
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INHERITED = ("HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy", "APT_CONFIG")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Build the environment of programs: a fixed PATH, the C locale and a few user variables."""
    kept = {key: os.environ[key] for key in _INHERITED if key in os.environ}
    return {"PATH": _PATH, "LC_ALL": "C.UTF-8", "TZ": "UTC", **kept, **(extra or {})}


def find_program(program: str) -> str:
    """Return the full path of a program.

    Raises:
        MissingProgram: it is not installed.
    """
    # shutil.which() would load libraries for compression in each start.
    for path in [Path(program)] if "/" in program else [Path(d, program) for d in _PATH.split(":")]:
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise MissingProgram(program, PACKAGES.get(program, program))


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    hint: str = "",
    both: bool = False,
) -> str:
    """Run a program until it ends and return its standard output.

    It runs in its own process group, which is ended if this call is interrupted: no child outlives
    the call. Programs that parse untrusted data run confined instead (vmm/confined_tool.py).

    Args:
        env: variables in addition to `environment`.
        stdin: bytes for its standard input; by default that is /dev/null.
        hint: the hint of the error if the program fails.
        both: return its standard error too, before its standard output.

    Raises:
        MissingProgram: the program is not installed.
        CommandFailed: it failed or printed too much; the error has both streams.
    """
    args = [find_program(os.fspath(argv[0])), *(os.fspath(a) for a in argv[1:])]
    process = subprocess.Popen(
        [*_END_WITH_PARENT, *args],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        # Files that a program creates must not depend on the caller's umask.
        umask=0o022,
    )
    out, err = bytearray(), bytearray()
    try:
        _exchange(process, stdin or b"", out, err)
    except _OutputLimit as error:
        _end_group(process)
        output, limit = err.decode(errors="replace"), ("output", f"{_OUTPUT_LIMIT >> 20} MiB")
        raise CommandFailed(shlex.join(args), -signal.SIGKILL, output, limit=limit) from error
    except BaseException:
        _end_group(process)
        raise
    if process.returncode:
        output = (err + b"\n" + out).decode(errors="replace")
        raise CommandFailed(shlex.join(args), process.returncode, output, hint=hint)
    return (err + out if both else out).decode(errors="replace")


class _OutputLimit(Exception):
    """The program printed more than the limit."""


def _exchange(
    process: subprocess.Popen[bytes], stdin: bytes, out: bytearray, err: bytearray
) -> None:
    """Feed the program ``stdin`` and read both of its streams until it ends.

    Raises:
        _OutputLimit: it printed more than the limit.
    """
    assert process.stdout and process.stderr  # noqa: S101 - for the type checker
    unsent, streams = memoryview(stdin), {process.stdout: out, process.stderr: err}
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        if process.stdin:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            for key, _ in selector.select():
                if key.fileobj is process.stdin:
                    unsent = _write_some(process.stdin, unsent)
                    if not unsent:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                data = os.read(key.fd, 64 << 10)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout and len(out) + len(data) > _OUTPUT_LIMIT:
                    raise _OutputLimit
                else:
                    kept = out if key.fileobj is process.stdout else err
                    keep(kept, data, None if kept is out else _STDERR_LIMIT)
    for stream in streams:
        stream.close()
    process.wait()


def _write_some(pipe: IO[bytes], data: memoryview) -> memoryview:
    """Write what the pipe accepts; return the rest, or nothing if its reader is gone."""
    try:
        return data[os.write(pipe.fileno(), data[: 64 << 10]) :] if data else data
    except BrokenPipeError:
        return data[:0]


def keep(kept: bytearray, data: bytes, most: int | None) -> None:
    """Append ``data`` to ``kept``, and bound its length.

    If ``kept`` exceeds twice ``most`` bytes, its beginning and its end stay, each ``most`` / 2.
    """
    kept += data
    if most and len(kept) > 2 * most:
        kept[most // 2 : -most // 2] = b"\n[...]\n"


async def run_shell(command: str, env: Mapping[str, str]) -> tuple[int, str]:
    """Run a user's shell command in the user's environment plus ``env``.

    If this call is interrupted, the command's process group is ended, as in `run`.

    Returns:
        The exit code, and the output without surrounding white space.
    """
    import asyncio

    # This thread starts the program, since PR_SET_PDEATHSIG fires when the thread ends.
    process = subprocess.Popen(  # noqa: ASYNC220
        [*_END_WITH_PARENT, "sh", "-c", command],
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        output, _ = await asyncio.to_thread(process.communicate)
    except BaseException:
        _end_group(process)
        raise
    return process.returncode, output.decode(errors="replace").strip()


class Detached:
    """A program of onecopy's that may outlive this process; a context manager.

    It runs in its own session and inherits ``pass_fds``. Leaving the context kills it, unless
    `keep` was called.
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
        """The process id."""
        return self._process.pid

    def ask(self, question: bytes) -> bytes:
        """Write ``question`` to standard input; return all of standard output."""
        assert self._process.stdin and self._process.stdout  # noqa: S101 - for the type checker
        try:
            self._process.stdin.write(question)
            self._process.stdin.close()
        except BrokenPipeError:
            return b""
        return self._process.stdout.read()

    def keep(self) -> None:
        """Let the program outlive the context."""
        # This keeps Popen from waiting for the program, and from warning that nobody does.
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
    """Send the group SIGTERM, so that mmdebstrap can unmount; then SIGKILL."""
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
