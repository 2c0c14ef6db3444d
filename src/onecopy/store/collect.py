"""Garbage collection: what is neither named nor leased goes.

Reachable is every manifest in the index, its config and its layers; held is what a live lease
lists. A blob that is only held is pending purge: gone at the first sweep after its last holder.
All of it runs under the store's lock, and what is seen free then stays free: a lease is locked
before it has its name, a workspace is made and locked under the store's lock. Not here: when it is
due (store.py).
"""

from __future__ import annotations

from onecopy.errors import StoreDamaged
from onecopy.store import lease, loading, oci, workspace
from onecopy.store.layout import Layout
from onecopy.store.leftovers import going_on
from onecopy.store.live import sweep as sweep_live


def reach(layout: Layout, entry: oci.Descriptor) -> set[str]:
    """Digests of ``entry``'s manifest and all that it lists; raise StoreDamaged."""
    owner = entry.ref or entry.digest
    data = loading.small_blob(layout, entry.digest, owner)
    links = oci.decode(data, oci.Links, layout.blob(entry.digest), loading.repair(owner))
    found = {entry.digest} | {blob.digest for blob in (links.config, *links.layers) if blob}
    for nested in links.manifests:
        # Another tool may have copied only one platform of an image.
        found |= reach(layout, nested) if layout.blob(nested.digest).exists() else set()
    return found


def collect(layout: Layout) -> list[str]:
    """Remove what is unwanted, stale leases last; return the digests of the blobs.

    Raises StoreDamaged, with nothing removed, if it cannot be known what is wanted. Killed half-way
    it leaves the stale leases, so the next sweep does the rest.
    """
    live, stale = lease.scan(layout)
    wanted = {digest for record in live for digest in record.blobs}
    for entry in loading.index(layout).manifests:
        wanted |= reach(layout, entry)
    there = {f"sha256:{path.name}": path for path in layout.blobs.iterdir()}
    unwanted = sorted(there.keys() - wanted)
    for digest in unwanted:
        with going_on(there[digest]):
            there[digest].unlink(missing_ok=True)
    sweep_live(layout, wanted)
    lease.remove_folders(layout)
    for path in stale:
        with going_on(path):
            path.unlink(missing_ok=True)
    return unwanted


def sweep(layout: Layout) -> None:
    """Collect, then clear tmp/; leave everything as it is in a damaged store.

    The damage is told to whoever reads the damaged artifact, and `rm` of it must still work.
    """
    try:
        collect(layout)
    except StoreDamaged:
        return
    workspace.sweep(layout)


def sweep_is_due(layout: Layout) -> bool:
    """Whether anything seems to be left by a killed command or an ended guest; cheap."""
    return workspace.has_leftovers(layout) or lease.any_stale(layout)
