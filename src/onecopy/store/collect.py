"""Garbage collection: remove blobs that are neither named nor leased.

Every manifest in the index is reachable, with its config and layers. A live lease holds the blobs
that it lists. A blob that is held but not reachable is pending purge: the first sweep after its
last holder removes it.

Everything runs under the store's lock, and what appears unlocked then stays unlocked. A lease is
locked before it gets its name, and a workspace is created and locked under the store's lock.

Not here: when collection is due (store.py).
"""

from __future__ import annotations

from onecopy.errors import StoreDamaged
from onecopy.store import lease, loading, oci, workspace
from onecopy.store.layout import Layout
from onecopy.store.leftovers import tolerate_failure
from onecopy.store.live import sweep as sweep_live


def reach(layout: Layout, entry: oci.Descriptor) -> set[str]:
    """Return the digests of a manifest and of everything that it lists.

    Raises:
        StoreDamaged: a record is missing or not valid.
    """
    owner = entry.ref or entry.digest
    data = loading.small_blob(layout, entry.digest, owner)
    links = oci.decode(data, oci.Links, layout.blob(entry.digest), loading.repair(owner))
    found = {entry.digest} | {blob.digest for blob in (links.config, *links.layers) if blob}
    for nested in links.manifests:
        # Another tool may have copied only one platform of an image.
        found |= reach(layout, nested) if layout.blob(nested.digest).exists() else set()
    return found


def collect(layout: Layout) -> list[str]:
    """Remove unneeded blobs, then stale leases.

    If this is killed, the stale leases remain, so the next sweep finishes the work.

    Returns:
        The digests of the removed blobs.

    Raises:
        StoreDamaged: a record cannot be read, so nothing is removed.
    """
    live, stale = lease.scan(layout)
    needed = {digest for record in live for digest in record.blobs}
    for entry in loading.index(layout).manifests:
        needed |= reach(layout, entry)
    present = {f"sha256:{path.name}": path for path in layout.blobs.iterdir()}
    unneeded = sorted(present.keys() - needed)
    for digest in unneeded:
        with tolerate_failure(present[digest]):
            present[digest].unlink(missing_ok=True)
    sweep_live(layout, needed)
    lease.remove_directories(layout)
    for path in stale:
        with tolerate_failure(path):
            path.unlink(missing_ok=True)
    return unneeded


def sweep(layout: Layout) -> None:
    """Collect, then clear tmp/; do nothing in a damaged store.

    A command that reads the damaged artifact reports the damage. Removing that artifact must remain
    possible.
    """
    try:
        collect(layout)
    except StoreDamaged:
        return
    workspace.sweep(layout)


def sweep_is_due(layout: Layout) -> bool:
    """Whether killed commands or ended guests seem to have left anything; cheap."""
    return workspace.has_leftovers(layout) or lease.any_stale(layout)
