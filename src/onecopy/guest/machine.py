"""What a guest is made of: the segments it maps and the hardware that QEMU shows it.

The record of a saved system (SystemConfig) is here, too, since it is the same list.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import msgspec

from onecopy.errors import Incompatible, InvalidInput, NoSlot, StoreDamaged
from onecopy.guest.backing import Backing, BackingRequest, map_mode
from onecopy.guest.run_directory import Attached, Device
from onecopy.images.initramfs import TOOLS_MOUNTPOINT, Mount
from onecopy.images.range_record import Range, SegmentConfig, layer_of
from onecopy.model import PageClass
from onecopy.store import Artifact, Layer
from onecopy.store.artifact import decode_config
from onecopy.vmm.argv import FIRST_SEGMENT_SLOT, MAX_SEGMENTS, Hardware, Slot

#: 3: the state has no section about the machine; the guest has a card with an address of its own.
#: 4: the machine has room for more processors.
#: 5: its programs are frozen, and its clones tell when their network card may be connected.
_SCHEMA = 5
_FILE = "system.json"


class MappedSegment(msgspec.Struct, frozen=True):
    """A range of a segment in its place in a guest."""

    name: str
    """NAME, or NAME.1 and so on for further ranges."""
    digest: str
    """Of the blob; "" for a range without stored content."""
    size: int
    """Bytes that are mapped."""
    fs: str
    mountpoint: str
    """"" if it is not mounted."""
    page_class: PageClass = PageClass.SR
    ref: str = ""
    """``NAME:VERSION`` of the segment at the time."""
    segment: str = ""
    """Digest of the segment's manifest."""
    number: int = 0
    """Its place in the segment."""


class Generator(msgspec.Struct, frozen=True):
    """A program with a random generator of its own, which all clones have in the same state."""

    program: str
    unit: str
    """Of systemd, that it runs in; "" if none."""
    source: str
    """The library, or the program, that the generator is part of."""
    secrets: bool
    """Whether keys and tokens come from it; else it is for numbers alone."""
    processes: int
    hook: str
    """The ready hook for it; "" if there is none."""
    covered: str
    """What seeds it again in each clone; "" if nothing does."""


class SystemConfig(msgspec.Struct, frozen=True):
    """Config record of a saved system: what must hold again when it is started."""

    machine: str
    cpu: str
    cpus: int
    memory: int
    """Bytes."""
    network: bool
    accel: str
    qemu: str
    """Version of the QEMU that saved it."""
    kernel: str
    """Release of its kernel."""
    root: str
    """Reference of its root segment, at the time."""
    command: str | None
    machine_id: bool
    """Whether the guest had a machine-id(5), so that each clone needs one of its own."""
    segments: tuple[MappedSegment, ...]
    on_clone: str | None = None
    """What each clone runs before it is handed out."""
    agent: bool = True
    """Whether our agent is in its guests: not in bare machines (guest/lifecycle/bootplan.py)."""
    cpu_room: int = 0
    """Processors that its kernel can have: those that it has, and places for more. 0: unknown."""
    clone_hooks: tuple[str, ...] = ()
    """What each clone runs before it is handed out, in that order and before ``on_clone``."""
    generators: tuple[Generator, ...] = ()
    """Programs whose random generators clones have in common."""
    schema: int = _SCHEMA

    @classmethod
    def of(cls, artifact: Artifact) -> SystemConfig:
        """The config of a saved system; raise StoreDamaged, or Incompatible if it is too old."""
        config = decode_config(artifact, cls, "then save it again")
        if config.schema != _SCHEMA:
            raise Incompatible(
                f"{artifact.ref} was saved by another version of onecopy, whose machines differ",
                hint="save it again",
            )
        return config

    def write(self, folder: Path) -> None:
        """Note in a run folder what its guest would be saved as."""
        (folder / _FILE).write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, folder: Path) -> SystemConfig:
        """What the guest of a run folder would be saved as; raise Incompatible."""
        try:
            return msgspec.json.decode((folder / _FILE).read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Incompatible(
                f"another version of onecopy started {folder.name}",
                hint="start it anew with this one",
            ) from error


class Placed(msgspec.Struct, frozen=True):
    """A range and its place in a guest; ``layer`` is its stored content, if it has any."""

    layer: Layer | None
    segment: MappedSegment

    @property
    def needed(self) -> BackingRequest:
        """What it has to be mapped from."""
        item = self.segment
        return BackingRequest(item.page_class, item.size, self.layer, item.segment, item.number)


def place(
    root: Artifact, tools: Artifact, kernel: Artifact, extra: Sequence[tuple[Artifact, str]]
) -> list[Placed]:
    """All ranges of a new guest, in slot order; raise InvalidInput."""
    _require_root(root)
    placed = [*ranges_of(root, "/"), *ranges_of(tools, TOOLS_MOUNTPOINT), _modules(kernel)]
    for artifact, mountpoint in extra:
        placed += ranges_of(artifact, mountpoint and check_mountpoint(mountpoint))
    _require_unique([item.segment.mountpoint for item in placed if item.segment.mountpoint])
    _require_unique([item.segment.name for item in placed])
    if len(placed) > MAX_SEGMENTS:
        raise NoSlot(
            f"a guest boots with {MAX_SEGMENTS - 3} ranges besides its root, and these are "
            f"{len(placed) - 3}",
            hint="`onecopy attach` the rest once it runs",
        )
    return placed


def _require_root(root: Artifact) -> None:
    ranges = SegmentConfig.of(root).ranges
    if len(ranges) > 1 or ranges[0].page_class is not PageClass.SR or not ranges[0].fs:
        raise InvalidInput(
            f"{root.ref} is no root segment: that is one SR range with a file system",
            hint="make one with `onecopy build`",
        )


def _require_unique(texts: Sequence[str]) -> None:
    for text in texts:
        if texts.count(text) > 1:
            raise InvalidInput(
                f"{text} is there twice", hint="a guest has each name and mount once"
            )


def check_mountpoint(mountpoint: str) -> str:
    """Return what can be a mount point of a segment; raise InvalidInput."""
    plain = mountpoint.isprintable() and " " not in mountpoint
    whole = mountpoint.startswith("/") and mountpoint != "/" and ".." not in mountpoint.split("/")
    if not plain or not whole:
        raise InvalidInput(
            f"{mountpoint!r} is not a mount point",
            hint="give an absolute path without blanks and ..",
        )
    return mountpoint


def ranges_of(artifact: Artifact, mountpoint: str, *, exclusive: bool = False) -> list[Placed]:
    """The ranges of a segment, the first one mounted if ``mountpoint`` is not "".

    With ``exclusive`` the guest has what others only read as a copy of its own, to write to (what
    z/VM calls a non-shared load). Raises InvalidInput, StoreDamaged.
    """
    ranges = SegmentConfig.of(artifact).ranges
    if mountpoint and not ranges[0].fs:
        raise InvalidInput(
            f"{artifact.ref} has no file system to mount on {mountpoint}",
            hint=f"leave the mount point out: guests find it as /dev/onecopy/{artifact.name}",
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
    """The segments of a saved system, whose blobs are layers of its artifact."""
    layers = {layer.digest: layer for layer in artifact.layers}
    try:
        return [Placed(layers[segment.digest], segment) for segment in config.segments]
    except KeyError as error:
        raise StoreDamaged(
            f"{artifact.ref} lacks its segment {error}", hint="save it again"
        ) from error


def mounts(placed: Sequence[Placed]) -> list[Mount]:
    """What the guest's first stage finds and mounts."""
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
    """The machine that a saved system must find again, but for its segments."""
    return Hardware(
        machine=config.machine,
        cpu=config.cpu,
        cpus=config.cpus,
        memory=config.memory,
        network=config.network,
        segments=(),
    )


def display_slots(placed: Sequence[Placed]) -> tuple[Slot, ...]:
    """The memory of segments as a command line shows it that is not run."""
    return tuple(
        Slot(
            item.layer.path if item.layer else Path(f"/proc/self/fd/{item.needed.memory_name}"),
            item.segment.size,
            map_mode(item.segment.page_class),
        )
        for item in placed
    )


def loaded(placed: Sequence[Placed], backed: Sequence[Backing]) -> tuple[Attached, ...]:
    """The record of the segments that a guest starts with; ranges of one lie side by side."""
    numbered = enumerate(zip(placed, backed, strict=True), start=FIRST_SEGMENT_SLOT)
    return tuple(
        attached(
            [(item, each, f"00:{number:02x}") for number, (item, each) in ranges], state="loaded"
        )
        for _, ranges in groupby(numbered, key=lambda each: each[1][0].segment.ref)
    )


def attached(
    ranges: Sequence[tuple[Placed, Backing, str]], *, state: str, exclusive: bool = False
) -> Attached:
    """The record of a segment in a guest: its ranges, their memory and their PCI addresses."""
    first = ranges[0][0].segment
    return Attached(
        name=first.name,
        ref=first.ref,
        digest=first.segment,
        devices=tuple(_device(*each) for each in ranges),
        mountpoint=first.mountpoint,
        state=state,
        exclusive=exclusive,
    )


def _device(placed: Placed, backed: Backing, address: str) -> Device:
    item = placed.segment
    return Device(item.page_class, item.size, item.fs, address, backed.mapped, backed.file)
