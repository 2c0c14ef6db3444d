"""What a guest is made of: the segments it maps and the hardware that QEMU shows it.

The record of a saved system (SystemConfig) is here, too, since it is the same list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from onecopy.build.bootfiles import TOOLS_MOUNTPOINT, Mount
from onecopy.errors import InvalidInput, StoreDamaged
from onecopy.store import Artifact, Layer
from onecopy.vmm.argv import FIRST_SEGMENT_SLOT, MAX_SEGMENTS, Hardware, Slot


class MappedSegment(msgspec.Struct, frozen=True):
    """A segment in its place in a guest."""

    name: str
    digest: str
    """Of the blob."""
    size: int
    """Bytes of the blob."""
    fs: str
    mountpoint: str


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
    schema: int = 1

    @classmethod
    def of(cls, artifact: Artifact) -> SystemConfig:
        """The config of a saved system; raise StoreDamaged."""
        try:
            return msgspec.json.decode(artifact.config, type=cls)
        except msgspec.MsgspecError as error:
            raise StoreDamaged(
                f"the record of {artifact.ref} cannot be read: {error}", hint="save it again"
            ) from error


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored blob and its place in a guest."""

    layer: Layer
    segment: MappedSegment


def place(
    root: Artifact, tools: Artifact, kernel: Artifact, extra: Sequence[tuple[Artifact, str]]
) -> list[Placed]:
    """All segments of a new guest, in slot order; raise InvalidInput."""
    if len(extra) + 3 > MAX_SEGMENTS:
        raise InvalidInput(f"a guest can map {MAX_SEGMENTS - 3} segments besides its root")
    placed = [
        _placed(root, "image", "/"),
        _placed(tools, "image", TOOLS_MOUNTPOINT),
        _placed(kernel, "modules", "/lib/modules"),
    ]
    taken = {item.segment.mountpoint for item in placed}
    for artifact, mountpoint in extra:
        if mountpoint in taken:
            raise InvalidInput(f"two segments cannot both be mounted on {mountpoint}")
        if not mountpoint.startswith("/") or set(mountpoint) & set(" \n\t") or ".." in mountpoint:
            raise InvalidInput(
                f"{mountpoint!r} is not a mount point", hint="give an absolute path without blanks"
            )
        taken.add(mountpoint)
        placed.append(_placed(artifact, "image", mountpoint))
    return placed


def _placed(artifact: Artifact, role: str, mountpoint: str) -> Placed:
    layer = artifact.layer(role)
    fs = layer.media_type.rpartition("+")[2]
    name = artifact.name if role == "image" else f"{artifact.name}-{role}"
    return Placed(layer, MappedSegment(name, layer.digest, layer.size, fs, mountpoint))


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
    """What the guest's first stage mounts."""
    return [
        Mount(FIRST_SEGMENT_SLOT + number, item.segment.fs, item.segment.mountpoint)
        for number, item in enumerate(placed)
    ]


def slots(placed: Sequence[Placed]) -> tuple[Slot, ...]:
    """What QEMU maps."""
    return tuple(Slot(item.layer.path, item.layer.size) for item in placed)


def blob_names(placed: Sequence[Placed]) -> dict[str, str]:
    """Path of each mapped blob -> name, for GuestRecord."""
    return {str(item.layer.path): item.segment.name for item in placed}


def hardware_of(config: SystemConfig, placed: Sequence[Placed]) -> Hardware:
    """The machine that a saved system must find again."""
    return Hardware(
        machine=config.machine,
        cpu=config.cpu,
        cpus=config.cpus,
        memory=config.memory,
        network=config.network,
        segments=slots(placed),
    )
