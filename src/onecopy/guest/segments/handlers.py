"""Handles the guests' requests for segments, by the rules of `onecopy attach`.

Not here: receiving requests (service.py), their format (protocol.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from onecopy.errors import (
    AlreadyExists,
    InsufficientResources,
    InvalidInput,
    NoSlot,
    NotFound,
    OnecopyError,
    OtherDomain,
    Restricted,
    TooLarge,
)
from onecopy.guest.machine import check_mountpoint
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments import protocol
from onecopy.guest.segments.hotplug import confirm, find, plug, release, require_detachable, words
from onecopy.guest.segments.protocol import Request
from onecopy.images.range_record import SegmentConfig
from onecopy.images.tools import TOOLS_NAME
from onecopy.model import Reference, check_name
from onecopy.store import Artifact

#: Errors whose message a guest gets. Other messages may describe the host.
TOLD = (
    *(AlreadyExists, InvalidInput, NoSlot, InsufficientResources, NotFound),
    *(OtherDomain, Restricted, TooLarge),
)


async def answer(host: Runtime, guest: str, request: Request) -> bytes:
    """Handle a request; return all lines of the answer. A refusal is an answer, too."""
    try:
        lines = [line async for line in _lines(host, guest, request)]
    except OnecopyError as error:
        return protocol.refusal(request.id, error, TOLD)
    return b"".join(lines)


async def _lines(host: Runtime, guest: str, request: Request) -> AsyncIterator[bytes]:
    arguments = request.arguments
    match request.verb:
        case "load":
            ref, where = Reference.parse(arguments[0]), protocol.mountpoint(arguments[1])
            own = protocol.exclusive(arguments[2])
            loading = await plug(host, guest, ref, where, exclusive=own)
            name, fs, _, *devices = words(loading, "")
            yield protocol.ok(request.id, " ".join((name, fs, *devices)))
        case "loaded":
            where = protocol.mountpoint(arguments[1])
            if where:
                check_mountpoint(where)
            await confirm(host, guest, check_name(arguments[0]), where)
            yield protocol.ok(request.id)
        case "failed":
            await release(host, guest, check_name(arguments[0]))
            yield protocol.ok(request.id)
        case "unload":
            name = check_name(arguments[0])
            require_detachable(host.guest(guest).record(), name)
            await release(host, guest, name)
            yield protocol.ok(request.id)
        case "find":
            yield protocol.item(request.id, _found(host, guest, arguments[0]))
            yield protocol.ok(request.id)
        case _:
            for line in _all(host, host.guest(guest).record()):
                yield protocol.item(request.id, line)
            yield protocol.ok(request.id)


def _found(host: Runtime, guest: str, text: str) -> str:
    record = host.guest(guest).record()
    artifact = host.store.resolve(Reference.parse(text), "segment")
    host.store.require_access([artifact.name], guest, record.domain)
    return _described(artifact, record)


def _all(host: Runtime, record: GuestRecord) -> Iterator[str]:
    """Yield a description of each segment that the guest may load."""
    for artifact in host.store.artifacts("segment"):
        if artifact.name.partition(".")[0] == TOOLS_NAME:
            continue
        try:
            host.store.require_access([artifact.name], record.name, record.domain)
        except (Restricted, OtherDomain):
            continue
        yield _described(artifact, record)


def _described(artifact: Artifact, record: GuestRecord) -> str:
    """Return NAME:VERSION CLASSES SIZE DIGEST ACCESS LOADED."""
    ranges = SegmentConfig.of(artifact).ranges
    try:
        item = find(record, artifact.name)
        where = item.mountpoint or "device" if item.digest == artifact.digest else "other-version"
    except NotFound:
        where = "-"
    size = sum(each.size for each in ranges)
    classes = ",".join(each.page_class for each in ranges)
    return f"{artifact.ref} {classes} {size} {artifact.digest} yes {where}"
