"""The store: names that lead to immutable blobs, and the leases that keep them.

Start at `onecopy.store.store.Store`. Not here: what the blobs mean (build/, guest/), who maps
their pages (sharing/).
"""

from onecopy.store.access import Access
from onecopy.store.artifact import Artifact, Layer, NewLayer
from onecopy.store.disk import require_disk
from onecopy.store.layout import default_root
from onecopy.store.lease import Lease, LeaseRecord
from onecopy.store.store import Store

__all__ = [
    "Access",
    "Artifact",
    "Layer",
    "Lease",
    "LeaseRecord",
    "NewLayer",
    "Store",
    "default_root",
    "require_disk",
]
