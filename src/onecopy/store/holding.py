"""What guests hold: making leases, and telling what is held but has no name any more.

Not here: what a lease is (lease.py).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping, Sequence

from onecopy.errors import AlreadyExists, NotFound, StoreDamaged
from onecopy.model import in_order
from onecopy.store import collect, lease, loading, names, oci
from onecopy.store.artifact import Artifact
from onecopy.store.layout import Layout
from onecopy.store.lease import Lease, LeaseRecord


def hold(layout: Layout, digests: Sequence[str], holder: str, info: Mapping[str, str]) -> Lease:
    """A holder's first lease; the store's lock is held."""
    _free(layout, holder)
    record = _record(layout, digests, holder, info)
    return lease.create(layout, record, lease.path_of(layout, holder))


def rename(layout: Layout, holder: str, name: str) -> None:
    """Let a holder have another name; the store's lock is held."""
    _free(layout, name)
    lease.rename(layout, holder, name)


def _free(layout: Layout, holder: str) -> None:
    """Make room for a new holder; raise AlreadyExists."""
    require_unheld(layout, holder)
    if lease.remains(layout, holder):
        # Writing over it would hide that its blobs may go.
        collect.sweep(layout)


def require_unheld(layout: Layout, holder: str) -> None:
    """Raise AlreadyExists if ``holder`` has a live lease."""
    if lease.is_live(layout, holder):
        raise AlreadyExists(
            f"{holder} runs already", hint="choose another name, or `onecopy stop` it"
        )


def extend(layout: Layout, digests: Sequence[str], holder: str) -> Lease:
    """A further lease of a holder; the store's lock is held."""
    if not lease.is_live(layout, holder):
        raise NotFound(f"{holder} does not run any more", hint="`onecopy ps` lists the guests")
    record = _record(layout, digests, holder, {})
    return lease.create(layout, record, lease.further_path(layout, holder))


def _record(
    layout: Layout, digests: Sequence[str], holder: str, info: Mapping[str, str]
) -> LeaseRecord:
    entries = _entries(layout, digests)
    return LeaseRecord(
        holder=holder,
        digests=tuple(digests),
        blobs=tuple(sorted(_needs(layout, entries))),
        names={entry.digest: entry.ref for entry in entries},
        info=dict(info),
    )


def _entries(layout: Layout, digests: Sequence[str]) -> list[oci.Descriptor]:
    entries = {entry.digest: entry for entry in names.ours(loading.index(layout))}
    for digest in digests:
        if digest not in entries:
            raise NotFound(
                f"{digest} has no name any more", hint="it was removed or replaced: try again"
            )
    return [entries[digest] for digest in digests]


def _needs(layout: Layout, entries: Iterable[oci.Descriptor]) -> set[str]:
    needed = set()
    for entry in entries:
        needed |= collect.reach(layout, entry)
        _require_whole(loading.artifact(layout, entry))
    return needed


def _require_whole(artifact: Artifact) -> None:
    """Raise StoreDamaged unless every blob has its size, so that no guest runs beyond its end."""
    for layer in artifact.layers:
        try:
            found = layer.path.stat()
        except FileNotFoundError as error:
            raise StoreDamaged(
                f"{layer.path} is missing", hint=loading.repair(artifact.ref)
            ) from error
        if found.st_size != layer.blob_size:
            raise StoreDamaged(
                f"{layer.path} of {artifact.ref} has {found.st_size} bytes in place of "
                f"{layer.blob_size}: it was changed behind onecopy's back",
                hint=loading.repair(artifact.ref),
            )
        if found.st_mode & 0o222 or not stat.S_ISREG(found.st_mode):
            raise StoreDamaged(
                f"{layer.path} of {artifact.ref} has the mode {stat.filemode(found.st_mode)}, and "
                "others may have changed it",
                hint=f"`onecopy verify {artifact.ref}`; if it is whole, chmod 444 {layer.path}",
            )


def held(layout: Layout, index: oci.Index, holder: str) -> list[oci.Descriptor]:
    """What a holder has leased now, under the names of that time; raise StoreDamaged."""
    named = {entry.digest: entry for entry in names.ours(index)}
    found = []
    for record in lease.scan(layout)[0]:
        if record.holder == holder:
            for digest, ref in record.names.items():
                found.append(named.get(digest) or _entry(layout, digest, ref))
    return [entry for entry in found if entry]


def pending(layout: Layout, index: oci.Index) -> list[oci.Descriptor]:
    """What is held and has no name any more, as the index named it; raise StoreDamaged."""
    named = {entry.digest for entry in index.manifests}
    found = {}
    for record in lease.scan(layout)[0]:
        for digest, ref in record.names.items():
            if digest not in named:
                found[digest] = _entry(layout, digest, ref)
    return sorted((e for e in found.values() if e), key=lambda entry: in_order(entry.ref))


def _entry(layout: Layout, digest: str, ref: str) -> oci.Descriptor | None:
    try:
        data = loading.small_blob(layout, digest, ref)
    except StoreDamaged:
        # Its last user ended since we looked.
        return None
    manifest = oci.decode(data, oci.Manifest, layout.blob(digest), loading.repair(ref))
    return oci.Descriptor(
        media_type=oci.MANIFEST_TYPE,
        digest=digest,
        size=len(data),
        artifact_type=manifest.artifact_type,
        annotations={oci.REF_NAME: ref},
    )
