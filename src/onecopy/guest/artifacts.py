"""What `ls` and `inspect` tell of an artifact."""

from __future__ import annotations

import json
from typing import Any

from onecopy.host import residency
from onecopy.store import Artifact, Layer, Store


def describe(store: Store, artifact: Artifact) -> dict[str, Any]:
    """One artifact as JSON values: sizes in bytes, null for unknown, ``users`` are guests."""
    resident = [_resident(layer) for layer in artifact.layers]
    return {
        "name": artifact.name,
        "version": artifact.version,
        "kind": artifact.kind,
        "digest": artifact.digest,
        "created": artifact.created,
        "size": artifact.size,
        "resident": None if None in resident else sum(size or 0 for size in resident),
        "users": store.users(artifact.digest),
    }


def describe_fully(store: Store, artifact: Artifact) -> dict[str, Any]:
    """Also its config and its layers; ``disk`` counts the blocks that a blob really has."""
    layers = [
        {
            "digest": layer.digest,
            "media_type": layer.media_type,
            "annotations": dict(layer.annotations),
            "size": layer.size,
            "disk": layer.path.stat().st_blocks * 512,
            "resident": _resident(layer),
            "path": str(layer.path),
        }
        for layer in artifact.layers
    ]
    config = json.loads(artifact.config)
    return {**describe(store, artifact), "config": config, "layers": layers}


def _resident(layer: Layer) -> int | None:
    return residency.resident_bytes(layer.path)
