"""A running guest, for asyncio."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from onecopy.errors import InvalidInput, NotFound, ProgramFailed
from onecopy.guest import ended_guests
from onecopy.guest.end_reason import Ended
from onecopy.guest.exec import Completed, run_streaming
from onecopy.guest.exec_streams import KEPT, Kept, Sink, Streams
from onecopy.guest.lifecycle import save, stop
from onecopy.guest.lifecycle.clone_hooks import checked
from onecopy.guest.run_directory import Attached, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments import attach, commit
from onecopy.guest.transfer import copy
from onecopy.guest.transfer.destination import StrPath
from onecopy.guest.transfer.tar import Limits
from onecopy.model import Reference, parse_mount
from onecopy.vmm.qemu_process import printed


class Guest:
    """A running guest."""

    def __init__(self, host: Runtime, record: GuestRecord) -> None:
        self._host = host
        self.record = record
        """What it is (docs/json.md), as it was when it was looked up."""

    def __repr__(self) -> str:
        return f"<guest {self.name}: {self.record.kind} of {self.record.source}>"

    @property
    def name(self) -> str:
        """Its name, and its hostname at the start."""
        return self.record.name

    def port(self, port: int) -> int:
        """The port of 127.0.0.1 by which a published port of the guest is reached."""
        for here, there in self.record.publish:
            if there == port:
                return here
        raise NotFound(f"port {port} of {self.name} is not published", hint="publish=[(0, PORT)]")

    async def exec(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        stdin: bytes | None = None,
        timeout: float | None = None,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> Completed:
        """Run a program in the guest, to its end, as root in ``/``.

        ``timeout`` seconds later it is killed, with all that it started, and its exit code is 124.
        Output is kept, up to 64 MiB of each of the two, beyond which TooLarge is raised; or given
        piece by piece to ``stdout`` and ``stderr``, and if one returns an awaitable the program
        waits for that. With ``check`` any exit code but 0 raises ProgramFailed.
        """
        if isinstance(argv, str) or not argv:
            raise InvalidInput(
                f"{argv!r} is not a program and its arguments",
                hint=f'give a list; for a shell\'s line ["sh", "-c", {argv!r}]',
            )
        out, err = Kept(KEPT), Kept(KEPT)
        streams = Streams(stdout or out, stderr or err, stdin)
        code = await run_streaming(self._with_agent().path, argv, streams, timeout=timeout)
        if check and code:
            raise ProgramFailed(self.name, shlex.join(argv), code, bytes(out), bytes(err))
        return Completed(code, bytes(out), bytes(err))

    async def copy_in(self, source: StrPath, target: str) -> None:
        """Copy a file or folder of the host to ``target`` in the guest, as `onecopy cp` does."""
        await copy.copy_in(self._with_agent().path, source, target)

    async def copy_out(
        self, source: str, target: StrPath, *, max_size: int = 16 << 30, max_files: int = 1_000_000
    ) -> None:
        """Copy a file or folder of the guest to ``target`` on the host, as `onecopy cp` does."""
        limits = Limits(max_size, max_files)
        await copy.copy_out(self._with_agent().path, source, target, limits)

    async def attach(self, segment: str, *, exclusive: bool = False) -> Attached:
        """Load ``SEGMENT[:/MOUNTPOINT]``; ``exclusive``: a copy of its own, to write to."""
        ref, mountpoint = parse_mount(segment)
        self._folder()
        return await attach.attach(self._host, self.name, ref, mountpoint, exclusive=exclusive)

    async def detach(self, segment: str) -> Attached:
        """Unload a segment; the guest keeps its device, and the lease, until it ends."""
        self._folder()
        return await attach.detach(self._host, self.name, segment)

    async def commit(self, segment: str, target: str | None = None) -> commit.Committed:
        """Make what it has written to its own copy of a segment the new version, or ``target``."""
        self._folder()
        ref = None if target is None else Reference.parse(target)
        return await commit.commit(self._host, self.name, segment, ref)

    async def save(
        self,
        system: str,
        *,
        on_clone: str | None = None,
        clone_hooks: Sequence[str] | None = None,
    ) -> save.Saved:
        """Store it, as it is now, as a saved system; it goes on."""
        self._folder()
        ref, hooks = Reference.parse(system), checked(clone_hooks)
        return await save.save_guest(
            self._host, ref, self.name, on_clone=on_clone, clone_hooks=hooks
        )

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait up to ``timeout`` seconds until it ends by itself; return whether it has ended."""
        return await stop.wait_for_end(self.record, timeout)

    async def stop(self, timeout: float = stop.PATIENCE) -> bool:
        """Ask it to shut down, and end it after ``timeout`` seconds; whether it did by itself."""
        self._folder()
        (ending,) = await stop.stop_guests(self._host, [self.record], timeout)
        return ending.how is stop.Ending.SHUT_DOWN

    def keep(self) -> None:
        """Let it outlive its block and this process: it is the user's, as `onecopy run`'s are."""
        self._folder().keep()

    def log(self) -> str:
        """What QEMU and the guest's console have printed; the last of it if it ended by itself."""
        try:
            return printed(self._folder().path)
        except NotFound:
            if not self.ended():
                raise
            return printed(ended_guests.path(self._host.run, self.name))

    def ended(self) -> Ended | None:
        """How it ended, if it did by itself and is still known; None if not."""
        self._host.sweep()
        found = ended_guests.find(self._host.run, self.name)
        return found.ended if found and found.process == self.record.process else None

    def _with_agent(self) -> RunDirectory:
        """Raise InvalidInput, too, for a bare machine."""
        self._folder()
        return self._host.guest_with_agent(self.name)

    def _folder(self) -> RunDirectory:
        """Raise NotFound if it has ended, and another one may have its name."""
        folder = self._host.guest(self.name)
        if folder.record().pid != self.record.pid:
            raise NotFound(f"{self.name} has ended", hint="another guest has this name now")
        return folder
