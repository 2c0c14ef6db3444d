"""The asyncio API of a running guest.

Not here: how the guest started (host.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from onecopy.errors import InvalidInput, NotFound, ProgramFailed
from onecopy.guest import ended_guests
from onecopy.guest.end import Ended
from onecopy.guest.exec import Completed, run_streaming
from onecopy.guest.exec_streams import KEPT, Kept, Sink, Streams
from onecopy.guest.lifecycle import save, stop
from onecopy.guest.lifecycle.clone_hooks import parse_hooks
from onecopy.guest.run_directory import Attached, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments import attach, commit
from onecopy.guest.transfer import copy
from onecopy.guest.transfer.destination import StrPath
from onecopy.guest.transfer.tar import Limits
from onecopy.model import Reference, parse_mount
from onecopy.vmm.qemu_process import printed


class Guest:
    """A running guest.

    `Host.start`, `Host.boot`, `Host.guests` and `Host.guest` return the instances.
    Methods that need the guest to run raise NotFound if it has ended.
    """

    def __init__(self, host: Runtime, record: GuestRecord) -> None:
        self._host = host
        self.record = record
        """The guest's record (docs/json.md) from the time of the look-up."""

    def __repr__(self) -> str:
        return f"<guest {self.name}: {self.record.kind} of {self.record.source}>"

    @property
    def name(self) -> str:
        """The guest's name, which is also its hostname when it starts."""
        return self.record.name

    @property
    def forked(self) -> bool | None:
        """Whether a fork server started the guest's QEMU; None if unknown.

        ``record.why_exec`` says why none did.
        """
        return self.record.forked

    def port(self, port: int) -> int:
        """Return the host's port, on 127.0.0.1, that leads to a published port of the guest.

        Args:
            port: The guest's port.

        Raises:
            NotFound: The port is not published.
        """
        for here, there in self.record.publish:
            if there == port:
                return here
        raise NotFound(
            f"port {port} of {self.name} is not published", hint="start it with publish=[(0, PORT)]"
        )

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
        """Run a program in the guest as root in ``/``, and wait for its end.

        Args:
            argv: The program and its arguments; no shell reads them.
            check: Raise ProgramFailed for any exit code but 0.
            stdin: Bytes for the program's standard input; None for an empty input.
            timeout: Seconds after which the program and its children are killed, with exit code
                124; None for no limit.
            stdout: A function that gets the output piece by piece. If it returns an awaitable, the
                program waits for that. None keeps the output, up to 64 MiB.
            stderr: The same for standard error.

        Returns:
            The exit code and the kept output.

        Raises:
            ProgramFailed: The exit code is not 0.
            TooLarge: The program wrote more output than is kept.
            InvalidInput: ``argv`` is a string or empty, or the guest is a bare machine.
            AgentFailed, GuestFailed: The guest or its agent failed.
        """
        if isinstance(argv, str) or not argv:
            raise InvalidInput(
                f"{argv!r} is not a list of a program and its arguments",
                hint=f'give a list; for a shell command: ["sh", "-c", {argv!r}]',
            )
        out, err = Kept(KEPT), Kept(KEPT)
        streams = Streams(stdout or out, stderr or err, stdin)
        code = await run_streaming(self._with_agent().path, argv, streams, timeout=timeout)
        if check and code:
            raise ProgramFailed(self.name, shlex.join(argv), code, bytes(out), bytes(err))
        return Completed(code, bytes(out), bytes(err))

    async def copy_in(self, source: StrPath, target: str) -> None:
        """Copy a file or directory of the host into the guest, like `onecopy cp`.

        Args:
            source: The path on the host.
            target: The path in the guest; an existing directory gets the copy inside.

        Raises:
            NotFound, InvalidInput, AlreadyExists, NotPermitted: A path cannot be used.
            InsufficientResources: The guest has too little free space.
            AgentFailed, GuestFailed: The guest or its agent failed.
        """
        await copy.copy_in(self._with_agent().path, source, target)

    async def copy_out(
        self, source: str, target: StrPath, *, max_size: int = 16 << 30, max_files: int = 1_000_000
    ) -> None:
        """Copy a file or directory of the guest to the host, like `onecopy cp`.

        Args:
            source: The path in the guest.
            target: The path on the host; an existing directory gets the copy inside.
            max_size: The most bytes to copy.
            max_files: The most files to copy.

        Raises:
            TooLarge: The copy exceeds a limit.
            NotFound, InvalidInput, AlreadyExists, NotPermitted: A path cannot be used.
            InsufficientResources: The host's disk has too little free space.
            AgentFailed, GuestFailed: The guest or its agent failed.
        """
        limits = Limits(max_size, max_files)
        await copy.copy_out(self._with_agent().path, source, target, limits)

    async def attach(self, segment: str, *, exclusive: bool = False) -> Attached:
        """Load a segment into the guest, like `onecopy attach`.

        Args:
            segment: ``SEGMENT`` or ``SEGMENT:/MOUNTPOINT``.
            exclusive: Give the guest a copy of its own, which it can write to.

        Returns:
            The entry of the segment in the guest's record.

        Raises:
            NotFound, Restricted, OtherDomain, AlreadyExists: The guest cannot have the segment.
            InvalidInput, NoSlot, TooLarge, InsufficientResources: The segment does not fit the
                guest.
            AgentFailed, GuestFailed: QEMU or the guest failed.
        """
        ref, mountpoint = parse_mount(segment)
        self._folder()
        return await attach.attach(self._host, self.name, ref, mountpoint, exclusive=exclusive)

    async def detach(self, segment: str) -> Attached:
        """Unload a segment, like `onecopy detach`.

        QEMU cannot unplug memory: the guest keeps the device and the lease until it ends.

        Args:
            segment: The name of a segment that the guest has loaded.

        Returns:
            The entry of the segment in the guest's record, in state ``kept``.

        Raises:
            NotFound: The guest has not loaded the segment.
            InvalidInput: The guest runs from the segment.
            NotUnmounted: Processes in the guest hold the segment; the error lists them.
            AgentFailed, GuestFailed: QEMU or the guest failed.
        """
        self._folder()
        return await attach.detach(self._host, self.name, segment)

    async def commit(self, segment: str, target: str | None = None) -> commit.Committed:
        """Store the guest's changes to a segment as a new version, like `onecopy commit`.

        Args:
            segment: A segment of which the guest has a copy of its own.
            target: ``NAME[:VERSION]`` of the new version; None replaces the segment's version.

        Returns:
            The new version, the bytes of changed pages, and the pause of the guest in seconds.

        Raises:
            NotFound, InvalidInput: The guest has not loaded the segment, or has no copy of its own.
            NameConflict: The name no longer means the segment that the guest loaded.
            StoreDamaged: The guest's file system is damaged.
            OnecopyError: QEMU, the guest's agent or the store failed.
        """
        self._folder()
        ref = None if target is None else Reference.parse(target)
        return await commit.commit(self._host, self.name, segment, ref)

    async def save(self, system: str, *, clone_hooks: Sequence[str] | None = None) -> save.Saved:
        """Save the guest as it is now, like `onecopy save --from`; the guest keeps running.

        Args:
            system: ``NAME[:VERSION]`` of the new saved system.
            clone_hooks: Hooks that each clone runs before it is handed out, as for `onecopy save
                --clone-hook`; None keeps those of the guest's own saved system.

        Returns:
            The saved system, its sizes in bytes, and the pause of the guest in seconds.

        Raises:
            InvalidInput: The guest has resources that a saved system cannot have.
            InUse: A program runs in the guest by `exec`.
            InsufficientResources: The disk has too little free space.
            AgentFailed, GuestFailed: QEMU or the guest failed.
        """
        self._folder()
        ref, hooks = Reference.parse(system), parse_hooks(clone_hooks)
        return await save.save_guest(self._host, ref, self.name, hooks=hooks)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until the guest ends.

        Args:
            timeout: The most seconds to wait; None for no limit.

        Returns:
            Whether the guest has ended.
        """
        return await stop.wait_for_end(self.record, timeout)

    async def stop(self, timeout: float = stop.PATIENCE) -> bool:
        """Ask the guest to shut down, and end it when the time is over.

        Args:
            timeout: Seconds for the guest to shut down; 0 ends it at once.

        Returns:
            Whether the guest shut down by itself, with all of its programs.
        """
        self._folder()
        (ending,) = await stop.stop_guests(self._host, [self.record], timeout)
        return ending.how is stop.Ending.SHUT_DOWN

    def keep(self) -> None:
        """Let the guest outlive its block and this process, like a guest of `onecopy run`."""
        self._folder().keep()

    def log(self) -> str:
        """Return the output of QEMU and of the guest's console.

        For a guest that ended by itself, return the last part of it.

        Raises:
            NotFound: The guest was stopped, or forgotten after its end.
        """
        try:
            return printed(self._folder().path)
        except NotFound:
            if not self.ended():
                raise
            return printed(ended_guests.path(self._host.run, self.name))

    def ended(self) -> Ended | None:
        """Return when and why the guest ended by itself.

        Returns:
            None if the guest runs, was stopped, or was forgotten after its end.
        """
        self._host.sweep()
        found = ended_guests.find(self._host.run, self.name)
        return found.ended if found and found.process == self.record.process else None

    def _with_agent(self) -> RunDirectory:
        """Return the run directory like `_folder`; raise InvalidInput for a bare machine."""
        self._folder()
        return self._host.guest_with_agent(self.name)

    def _folder(self) -> RunDirectory:
        """Return the run directory; raise NotFound if the guest ended or another has its name."""
        folder = self._host.guest(self.name)
        if folder.record().pid != self.record.pid:
            raise NotFound(f"{self.name} has ended", hint="another guest has this name now")
        return folder
