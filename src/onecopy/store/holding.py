"""What guests hold: create leases, and list artifacts that are held but no longer named.

Not here: how a lease works (lease.py).
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
    """Create a holder's first lease; the caller holds the store's lock."""
    _clear_remains(layout, holder)
    record = _record(layout, digests, holder, info)
    return lease.create(layout, record, lease.path_of(layout, holder))


def rename(layout: Layout, holder: str, name: str) -> None:
    """Rename a holder; the caller holds the store's lock."""
    _clear_remains(layout, name)
    lease.rename(layout, holder, name)


def _clear_remains(layout: Layout, holder: str) -> None:
    """Clear the remains of an earlier holder of that name.

    Raises:
        AlreadyExists: the holder is alive.
    """
    require_unheld(layout, holder)
    if lease.remains(layout, holder):
        # Overwriting the old lease would hide that its blobs can be removed.
        collect.sweep(layout)


def require_unheld(layout: Layout, holder: str) -> None:
    """Require that ``holder`` has no live lease.

    Raises:
        AlreadyExists: it has one.
    """
    if lease.is_live(layout, holder):
        raise AlreadyExists(
            f"{holder} is already running",
            hint="choose another name, or stop the guest with `onecopy stop`",
        )


def extend(layout: Layout, digests: Sequence[str], holder: str) -> Lease:
    """Create a further lease of a holder; the caller holds the store's lock."""
    if not lease.is_live(layout, holder):
        raise NotFound(f"{holder} is no longer running", hint="`onecopy ps` lists the guests")
    record = _record(layout, digests, holder, {})
    return lease.create(layout, record, lease.further_path(layout, holder))


def _record(
    layout: Layout, digests: Sequence[str], holder: str, info: Mapping[str, str]
) -> LeaseRecord:
    entries = _entries(layout, digests)
    return LeaseRecord(
        holder=holder,
        digests=tuple(digests),
        blobs=tuple(sorted(_required_blobs(layout, entries))),
        names={entry.digest: entry.ref for entry in entries},
        info=dict(info),
    )


def _entries(layout: Layout, digests: Sequence[str]) -> list[oci.Descriptor]:
    entries = {entry.digest: entry for entry in names.ours(loading.index(layout))}
    for digest in digests:
        if digest not in entries:
            raise NotFound(
                f"{digest} no longer has a name",
                hint="it was removed or replaced; repeat the command",
            )
    return [entries[digest] for digest in digests]


def _required_blobs(layout: Layout, entries: Iterable[oci.Descriptor]) -> set[str]:
    needed = set()
    for entry in entries:
        needed |= collect.reach(layout, entry)
        _require_whole(loading.artifact(layout, entry))
    return needed


def _require_whole(artifact: Artifact) -> None:
    """Require that every blob has its full size, so that no guest runs past its end."""
    for layer in artifact.layers:
        try:
            found = layer.path.stat()
        except FileNotFoundError as error:
            raise StoreDamaged(
                f"{layer.path} is missing", hint=loading.repair(artifact.ref)
            ) from error
        if found.st_size != layer.blob_size:
            raise StoreDamaged(
                f"{layer.path} of {artifact.ref} has {found.st_size} bytes instead of "
                f"{layer.blob_size}: something other than onecopy has modified it",
                hint=loading.repair(artifact.ref),
            )
        if found.st_mode & 0o222 or not stat.S_ISREG(found.st_mode):
            raise StoreDamaged(
                f"{layer.path} of {artifact.ref} has the mode {stat.filemode(found.st_mode)}, so "
                "that others may have modified it",
                hint=f"run `onecopy verify {artifact.ref}`; if it reports no damage, run chmod "
                f"444 {layer.path}",
            )


def held(layout: Layout, index: oci.Index, holder: str) -> list[oci.Descriptor]:
    """List what a holder leases now, under the names from the time of the lease.

    Raises:
        StoreDamaged: a record cannot be read.
    """
    named = {entry.digest: entry for entry in names.ours(index)}
    found = []
    for record in lease.scan(layout)[0]:
        if record.holder == holder:
            for digest, ref in record.names.items():
                found.append(named.get(digest) or _entry(layout, digest, ref))
    return [entry for entry in found if entry]


def pending(layout: Layout, index: oci.Index) -> list[oci.Descriptor]:
    """List what is held but no longer named, under the last names.

    Raises:
        StoreDamaged: a record cannot be read.
    """
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
        # Its last user ended meanwhile.
        return None
    manifest = oci.decode(data, oci.Manifest, layout.blob(digest), loading.repair(ref))
    return oci.Descriptor(
        media_type=oci.MANIFEST_TYPE,
        digest=digest,
        size=len(data),
        artifact_type=manifest.artifact_type,
        annotations={oci.REF_NAME: ref},
    )
