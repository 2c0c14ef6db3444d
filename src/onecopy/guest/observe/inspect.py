"""Describes artifacts for `ls` and `inspect`."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from onecopy.errors import StoreDamaged
from onecopy.guest.pagecache.pin import holder_of
from onecopy.images.range_record import SegmentConfig
from onecopy.linux import verity
from onecopy.linux.counters import residency
from onecopy.store import Access, Artifact, Layer, Store


def describe(store: Store, artifact: Artifact, *, pending: bool = False) -> dict[str, Any]:
    """Describe an artifact as JSON values.

    Args:
        store: The store of the artifact.
        artifact: The artifact.
        pending: Whether it has lost its name while guests use it (pending purge).

    Returns:
        The fields of docs/json.md; sizes are bytes, None is unknown, ``users`` are guests.
    """
    access = store.access(artifact.name)
    resident = [_resident(layer) for layer in artifact.layers]
    return {
        "name": artifact.name,
        "version": artifact.version,
        "kind": artifact.kind,
        "state": _state(access, pending=pending),
        "domain": _domain(artifact, access, pending=pending),
        "grants": list(access.grants),
        "classes": _classes(artifact),
        "digest": artifact.digest,
        "created": artifact.created or None,
        "size": artifact.size,
        "resident": None if None in resident else sum(size or 0 for size in resident),
        "users": store.users(artifact.digest),
        "pinned": store.is_held(holder_of(artifact)),
    }


def describe_fully(store: Store, artifact: Artifact) -> dict[str, Any]:
    """Describe an artifact with its config and layers; ``disk`` is the blob's allocated bytes."""
    layers = [
        {
            "digest": layer.digest,
            "media_type": layer.media_type,
            "annotations": dict(layer.annotations),
            "size": layer.size,
            "disk": layer.path.stat().st_blocks * 512,
            "resident": _resident(layer),
            "protected": verity.is_enabled(layer.path),
            "path": str(layer.path),
        }
        for layer in artifact.layers
    ]
    config = json.loads(artifact.config)
    pending = artifact in store.pending()
    return {**describe(store, artifact, pending=pending), "config": config, "layers": layers}


def _state(access: Access, *, pending: bool) -> str:
    """Return A (available), R (restricted) or P (pending purge), as z/VM's QUERY NSS."""
    return "P" if pending else "R" if access.restricted else "A"


def _domain(artifact: Artifact, access: Access, *, pending: bool) -> str:
    # The name of a pending artifact may belong to another domain now.
    domains = {layer.domain for layer in artifact.layers}
    return domains.pop() if pending and domains else access.domain


def _classes(artifact: Artifact) -> list[str] | None:
    """Return the page classes of a segment's ranges; None if its record is damaged."""
    if artifact.kind != "segment":
        return []
    with contextlib.suppress(StoreDamaged):
        return [str(item.page_class) for item in SegmentConfig.of(artifact).ranges]
    return None


def _resident(layer: Layer) -> int | None:
    return residency.resident_bytes(layer.path)
