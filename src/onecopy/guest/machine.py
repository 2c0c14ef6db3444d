"""The parts of a guest: the segments that it maps and its hardware.

The record of a saved system (SystemConfig) is here, because it lists the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible, InvalidInput, NoSlot, StoreDamaged
from onecopy.images.initramfs import TOOLS_MOUNTPOINT, Mount
from onecopy.images.range_record import Range, SegmentConfig, layer_of
from onecopy.model import MIB, PageClass
from onecopy.store import Artifact, Layer
from onecopy.store.artifact import decode_config
from onecopy.vmm.argv import FIRST_SEGMENT_SLOT, MAX_SEGMENTS, Hardware

#: 3: the state has no section about the machine; the guest has a card with an address of its own.
#: 4: the machine has free CPU slots.
#: 5: programs are frozen; clones report when their network card may be connected.
#: 6: on_clone is called clone_command.
_SCHEMA = 6
#: The most bytes of a machine's device state; about 300 KiB are usual.
STATE_ROOM = 16 * MIB
_FILE = "system.json"


class MappedSegment(msgspec.Struct, frozen=True):
    """A range of a segment, as a guest maps it."""

    name: str
    """NAME; NAME.1 and so on for further ranges."""
    digest: str
    """Digest of the blob; "" for a range without stored content."""
    size: int
    """Mapped bytes."""
    fs: str
    """File system; "" for none."""
    mountpoint: str
    """Mount point; "" for a range that is not mounted."""
    page_class: PageClass = PageClass.SR
    ref: str = ""
    """``NAME:VERSION`` of the segment when it was mapped."""
    segment: str = ""
    """Digest of the segment's manifest."""
    number: int = 0
    """Index of the range in its segment."""

    @property
    def memory_name(self) -> str:
        """The name of the range's memory file in /proc/PID/fd and maps."""
        return f"onecopy-{self.segment.removeprefix('sha256:')}.{self.number}"


class Generator(msgspec.Struct, frozen=True):
    """A program with a random generator of its own, whose saved state all clones share."""

    program: str
    unit: str
    """The program's systemd unit; "" for none."""
    source: str
    """The library or program that contains the generator."""
    secrets: bool
    """Whether it is used for keys and tokens."""
    processes: int
    """Number of processes."""
    hook: str
    """The ready hook for it; "" for none."""
    covered: str
    """The hook or step that re-seeds it in each clone; "" for none."""


class SystemConfig(msgspec.Struct, frozen=True):
    """Config record of a saved system: the machine that each clone must have."""

    machine: str
    cpu: str
    cpus: int
    memory: int
    """Bytes of RAM."""
    network: bool
    accel: str
    qemu: str
    """Version of the QEMU that saved it."""
    kernel: str
    """Release of its kernel."""
    root: str
    """Reference of its root segment when it was saved."""
    command: str | None
    """The command under the minimal init; None if the image's init runs."""
    machine_id: bool
    """Whether the guest had a machine-id(5); then each clone gets one of its own."""
    segments: tuple[MappedSegment, ...]
    clone_command: str | None = None
    """The shell command that each clone runs last before it is ready."""
    agent: bool = True
    """Whether its guests have an agent; bare machines have none."""
    cpu_room: int = 0
    """The most vCPUs that its kernel supports; 0 if unknown."""
    clone_hooks: tuple[str, ...] = ()
    """Hooks that each clone runs before it is ready, in order, before ``clone_command``."""
    generators: tuple[Generator, ...] = ()
    """Programs whose random generators clones share."""
    schema: int = _SCHEMA

    @classmethod
    def of(cls, artifact: Artifact) -> SystemConfig:
        """Read the config record of a saved system.

        Raises:
            StoreDamaged: The record is malformed.
            Incompatible: Another version of onecopy saved the system.
        """
        config = decode_config(artifact, cls, "then save it again")
        if config.schema != _SCHEMA:
            raise Incompatible(
                f"{artifact.ref} has record schema {config.schema}, this onecopy needs {_SCHEMA}",
                hint="save it again with this version",
            )
        return config

    def write(self, folder: Path) -> None:
        """Write the record that a save of the guest would have into its run directory."""
        (folder / _FILE).write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, folder: Path) -> SystemConfig:
        """Read the record that a save of the guest would have from its run directory.

        Raises:
            Incompatible: The record is missing or malformed.
        """
        try:
            return msgspec.json.decode((folder / _FILE).read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Incompatible(
                f"another version of onecopy started {folder.name}",
                hint="end it, and start it again with this version",
            ) from error


class Placed(msgspec.Struct, frozen=True):
    """A range in a guest; ``layer`` is its stored content, if any."""

    layer: Layer | None
    segment: MappedSegment


def place(
    root: Artifact, tools: Artifact, kernel: Artifact, extra: Sequence[tuple[Artifact, str]]
) -> list[Placed]:
    """List all ranges of a new guest in slot order.

    Args:
        root: The root segment.
        tools: The tools segment.
        kernel: The kernel, whose modules the guest maps.
        extra: Further segments and their mount points; "" to leave one unmounted.

    Raises:
        InvalidInput: The segments do not go together.
        NoSlot: There are more ranges than slots.
    """
    _require_root(root)
    placed = [*ranges_of(root, "/"), *ranges_of(tools, TOOLS_MOUNTPOINT), _modules(kernel)]
    for artifact, mountpoint in extra:
        placed += ranges_of(artifact, mountpoint and check_mountpoint(mountpoint))
    _require_unique([item.segment.mountpoint for item in placed if item.segment.mountpoint])
    _require_unique([item.segment.name for item in placed])
    if len(placed) > MAX_SEGMENTS:
        raise NoSlot(
            f"the guest has {len(placed) - 3} ranges besides its root; "
            f"the limit at boot is {MAX_SEGMENTS - 3}",
            hint="attach the rest with `onecopy attach` when the guest runs",
        )
    return placed


def _require_root(root: Artifact) -> None:
    ranges = SegmentConfig.of(root).ranges
    if len(ranges) > 1 or ranges[0].page_class is not PageClass.SR or not ranges[0].fs:
        raise InvalidInput(
            f"{root.ref} is not a root segment, which is one SR range with a file system",
            hint="build one with `onecopy build`",
        )


def _require_unique(texts: Sequence[str]) -> None:
    for text in texts:
        if texts.count(text) > 1:
            raise InvalidInput(
                f"{text} is used twice", hint="give each segment and mount point only once"
            )


def check_mountpoint(mountpoint: str) -> str:
    """Return ``mountpoint`` if it can be a segment's mount point.

    Raises:
        InvalidInput: It is not absolute, or contains blanks or "..".
    """
    plain = mountpoint.isprintable() and " " not in mountpoint
    whole = mountpoint.startswith("/") and mountpoint != "/" and ".." not in mountpoint.split("/")
    if not plain or not whole:
        raise InvalidInput(
            f"{mountpoint!r} is not a mount point",
            hint="give an absolute path without blanks and without ..",
        )
    return mountpoint


def ranges_of(artifact: Artifact, mountpoint: str, *, exclusive: bool = False) -> list[Placed]:
    """List the ranges of a segment for a guest.

    Args:
        artifact: The segment.
        mountpoint: Mount point of the first range; "" to leave it unmounted.
        exclusive: Map shared read-only ranges as the guest's own writable copy (z/VM calls this a
            non-shared load).

    Raises:
        InvalidInput: The first range has no file system to mount.
        StoreDamaged: The segment's record is malformed.
    """
    ranges = SegmentConfig.of(artifact).ranges
    if mountpoint and not ranges[0].fs:
        raise InvalidInput(
            f"{artifact.ref} has no file system to mount on {mountpoint}",
            hint=f"omit the mount point: the guest gets the device /dev/onecopy/{artifact.name}",
        )
    return [
        _placed(artifact, number, item, "" if number else mountpoint, exclusive=exclusive)
        for number, item in enumerate(ranges)
    ]


def _placed(
    artifact: Artifact, number: int, item: Range, mountpoint: str, *, exclusive: bool
) -> Placed:
    layer = layer_of(artifact, number, item)
    own = exclusive and item.page_class in (PageClass.SR, PageClass.ER)
    segment = MappedSegment(
        name=f"{artifact.name}.{number}" if number else artifact.name,
        digest=layer.digest if layer else "",
        size=item.size,
        fs=item.fs,
        mountpoint=mountpoint,
        page_class=PageClass.EW if own else item.page_class,
        ref=artifact.ref,
        segment=artifact.digest,
        number=number,
    )
    return Placed(layer, segment)


def _modules(kernel: Artifact) -> Placed:
    layer = kernel.layer("modules")
    name, fs = f"{kernel.name}-modules", layer.media_type.rpartition("+")[2]
    segment = MappedSegment(
        name, layer.digest, layer.size, fs, "/lib/modules", ref=kernel.ref, segment=kernel.digest
    )
    return Placed(layer, segment)


def saved_places(artifact: Artifact, config: SystemConfig) -> list[Placed]:
    """Return the ranges of a saved system, whose blobs are layers of its artifact.

    Raises:
        StoreDamaged: A layer is missing.
    """
    layers = {layer.digest: layer for layer in artifact.layers}
    try:
        return [Placed(layers[segment.digest], segment) for segment in config.segments]
    except KeyError as error:
        raise StoreDamaged(
            f"{artifact.ref} lacks the layer of its segment {error}", hint="save it again"
        ) from error


def mounts(placed: Sequence[Placed]) -> list[Mount]:
    """Return the mounts for the guest's first stage."""
    return [
        Mount(
            slot=FIRST_SEGMENT_SLOT + number,
            fstype=item.segment.fs,
            mountpoint=item.segment.mountpoint,
            segment=_segment_name(item.segment),
            name=item.segment.name,
            writable=item.segment.page_class.writable,
        )
        for number, item in enumerate(placed)
    ]


def _segment_name(item: MappedSegment) -> str:
    return item.name.removesuffix(f".{item.number}") if item.number else item.name


def hardware_of(config: SystemConfig) -> Hardware:
    """Return the machine of a saved system, without its segments."""
    return Hardware(
        machine=config.machine,
        cpu=config.cpu,
        cpus=config.cpus,
        memory=config.memory,
        network=config.network,
        segments=(),
    )
