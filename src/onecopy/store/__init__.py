"""The store: names, the immutable blobs that they refer to, and the leases that protect these.

The entry point is `onecopy.store.store.Store`.

Not here: what blobs contain (images/, guest/), and which processes map their pages (sharing/).
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
