"""Stores a guest's changes to its own copy of a segment as a new version: `onecopy commit`.

The guest's file system is frozen and its vCPUs are stopped while the pages that it wrote are
copied. All other pages come from the stored blob. The new version gets its name when it is on disk
and its digests are verified. Not here: finding the pages (linux/cow_pages.py), names (store/).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from onecopy.errors import CommandFailed, InvalidInput, StoreDamaged
from onecopy.guest.pause import copying, paused
from onecopy.guest.run_directory import Attached, Device, GuestRecord, RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.hotplug import changing, find
from onecopy.images.range_record import MEDIA_TYPE, SegmentConfig, role
from onecopy.linux import cow_pages
from onecopy.linux.cow_pages import Run
from onecopy.model import PageClass, Reference
from onecopy.store import Artifact, Layer, NewLayer, require_disk
from onecopy.store.disk import file_errors
from onecopy.store.oci import ROLE
from onecopy.subprocesses import run
from onecopy.vmm.confined_tool import run_on_file


class Committed(msgspec.Struct, frozen=True):
    """The result of a commit."""

    artifact: Artifact
    """The new version."""
    written: int
    """Bytes of the pages that the guest wrote."""
    pause: float
    """Seconds for which its vCPUs were stopped."""


async def commit(
    host: Runtime,
    name: str,
    segment: str,
    target: Reference | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Committed:
    """Store a guest's EW copy of ``segment`` as a new version of ``target`` or its own name.

    The guest continues with its copy; others keep the old version. A failure stores nothing.

    Raises:
        NotFound, InvalidInput: The guest has not loaded the segment, or not as EW.
        NameConflict: The name no longer means what the guest loaded.
        StoreDamaged: The guest's file system is damaged.
        OnecopyError: QEMU, the guest's agent or the store failed.
    """
    async with changing(host, name) as folder:
        record = folder.require_agent()
        item = find(record, segment)
        own = _own(record, item)
        old = host.store.resolve(Reference(item.name, digest=item.digest), "segment")
        target = target or Reference.parse(item.ref)
        host.store.require_free("segment", target)
        require_disk(host.store.root, sum(device.size for device in own.values()))
        with host.store.workspace() as work:
            progress("copying the stored version")
            for number in own:
                _copy(old.layer(role(number)), own[number].size, work / role(number))
            progress("freezing the guest")
            runs, pause = await _collect(host, record, folder, segment, own, work)
            for number, device in own.items():
                _check(work / role(number), device.fs, segment)
            progress("storing the new version")
            config, layers = _new_version(old, set(own) if any(runs) else set(), work)
            artifact = host.store.put(
                "segment",
                target,
                config.encode(),
                layers,
                # Replace the name only if it still means the version that the guest loaded.
                replace=item.digest if str(target) == item.ref else False,
                access=host.store.access(old.name),
            )
            progress("verifying the new version")
            _read_back(host, artifact)
    return Committed(artifact, sum(each.size for each in runs), pause)


def _own(record: GuestRecord, item: Attached) -> dict[int, Device]:
    """Return the ranges of which the guest has its own copy, by number; raise InvalidInput."""
    own = {n: d for n, d in enumerate(item.devices) if d.page_class is PageClass.EW}
    if not own:
        raise InvalidInput(
            f"{record.name} has no writable copy of {item.ref}",
            hint=f"run `onecopy detach {record.name} {item.name}`, then attach it with --exclusive",
        )
    return own


def _copy(layer: Layer, size: int, out: Path) -> None:
    run(["cp", "--sparse=always", "--reflink=auto", "--no-preserve=all", layer.path, out])
    os.truncate(out, size)


async def _collect(
    host: Runtime,
    record: GuestRecord,
    folder: RunDirectory,
    segment: str,
    own: dict[int, Device],
    work: Path,
) -> tuple[list[Run], float]:
    """Write the guest's pages over the copies; return the pages and the seconds of the pause."""
    async with paused(folder, segment):
        began = time.monotonic()
        with copying(record.name):
            runs = await asyncio.to_thread(_overwrite, record.pid, own, work, host.store.root)
        pause = time.monotonic() - began
    return runs, pause


def _overwrite(pid: int, own: dict[int, Device], work: Path, root: Path) -> list[Run]:
    found = []
    for number, device in own.items():
        runs = cow_pages.own_runs(pid, device.path)
        with file_errors(root), (work / role(number)).open("r+b", buffering=0) as out:
            cow_pages.copy_out(pid, runs, out.fileno())
        found += runs
    return found


def _check(image: Path, fs: str, segment: str) -> None:
    """Check the file system as after a crash; raise StoreDamaged."""
    if not fs:
        return
    try:
        with image.open("r+b") as file:
            # e2fsck(8): 1 means that it repaired errors. A freeze leaves the mounted flag set.
            run_on_file(["e2fsck", "-f", "-p"], file.fileno(), fine=(0, 1))
    except CommandFailed as error:
        output = error.message if error.limit else error.output
        last = "\n".join(output.strip().splitlines()[-5:])
        raise StoreDamaged(
            f"the guest's file system on {segment} is damaged, so nothing was stored:\n{last}",
            hint="repair it in the guest, or detach the segment and attach it again",
        ) from error


def _new_version(
    old: Artifact, written: set[int], work: Path
) -> tuple[SegmentConfig, list[NewLayer]]:
    """Return record and layers of the new version; ``written`` are the changed ranges."""
    config = SegmentConfig.of(old)
    if written:
        config = msgspec.structs.replace(config, parent=old.digest)
    layers = []
    for number, item in enumerate(config.ranges):
        if number in written:
            form = f"{MEDIA_TYPE}+{item.fs or 'raw'}"
            layers.append(NewLayer(work / role(number), form, {ROLE: role(number)}))
        elif item.page_class.saved:
            layers.append(NewLayer.of(old.layer(role(number)), {ROLE: role(number)}))
    return config, layers


def _read_back(host: Runtime, artifact: Artifact) -> None:
    """Verify the digests of the blobs on disk, not of their cached pages."""
    for layer in artifact.layers:
        with layer.path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    host.store.verify(artifact)
