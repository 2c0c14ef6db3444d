"""Store and name an artifact atomically.

Files are hashed, and copied from other trust domains, before the store's lock is taken.

Not here: how a file becomes a blob (ingest.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache

import msgspec

from onecopy.errors import InvalidInput, NameConflict, OtherDomain
from onecopy.model import Reference
from onecopy.store import access as access_rules
from onecopy.store import ingest, loading, names, oci
from onecopy.store.access import Access
from onecopy.store.artifact import Artifact, NewLayer
from onecopy.store.change import change, write_blob, write_index
from onecopy.store.disk import file_errors, sync_directory
from onecopy.store.domain import DOMAIN
from onecopy.store.layout import Layout
from onecopy.store.workspace import workspace


class PutRequest(msgspec.Struct, frozen=True):
    """What to name, and under which conditions; see `Store.put`."""

    kind: str
    ref: Reference
    replace: bool | str = True
    access: Access | None = None


def put(layout: Layout, request: PutRequest, config: bytes, layers: Sequence[NewLayer]) -> Artifact:
    """Store and name an artifact; see `Store.put`."""
    require_name(request.ref)
    oci.artifact_type(request.kind)
    domain = _domain(layout, request)
    with file_errors(layout.root), ExitStack() as clean:
        # Created only if used, because naming must also work on a full disk.
        work = cache(lambda: clean.enter_context(workspace(layout)))
        mine = [ingest.in_domain(layout, layer, domain, work) for layer in layers]
        blobs = [ingest.describe(layout, layer, domain, clean) for layer in mine]
        config = ingest.replace_digests(config, layers, blobs)
        with change(layout):
            return _name(layout, request, domain, config, list(zip(mine, blobs, strict=True)))


def require_name(ref: Reference) -> None:
    """Require that a reference can be a new name.

    Raises:
        InvalidInput: it has a digest.
    """
    if ref.digest:
        raise InvalidInput(
            f"{ref} cannot be a new name: it contains a digest", hint="use NAME:VERSION"
        )


def require_free(layout: Layout, request: PutRequest) -> None:
    """Require that a name can be used; see `Store.require_free`."""
    require_name(request.ref)
    index = loading.index(layout)
    names.require_same_kind(index, str(request.ref), request.kind)
    _with_access(index, request, _domain(layout, request))


def _name(
    layout: Layout,
    request: PutRequest,
    domain: str,
    config: bytes,
    layers: Sequence[tuple[NewLayer, oci.Descriptor]],
) -> Artifact:
    # Artifacts without layers, too, must differ between trust domains.
    mark = {DOMAIN: domain} if domain else {}
    manifest = oci.manifest(request.kind, config, [blob for _, blob in layers], mark)
    data = oci.encode(manifest)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    index = loading.index(layout)
    if isinstance(request.replace, str):
        names.require_digest(index, request.ref, request.replace)
    entry = oci.index_entry(request.kind, request.ref, data, now)
    entry = names.claim(index, entry, replace=bool(request.replace))
    index = _with_access(index, request, domain)
    # The steps that can fail on a full disk come first, before the caller's files are moved.
    write_blob(layout, manifest.config.digest, config)
    write_blob(layout, entry.digest, data)
    for layer, blob in layers:
        ingest.move_in(layout, layer, blob.digest)
    sync_directory(layout.blobs)
    write_index(layout, names.bind(index, entry))
    return loading.artifact(layout, entry)


def _domain(layout: Layout, request: PutRequest) -> str:
    """Return the trust domain that a name has or will have."""
    index, name = loading.index(layout), request.ref.name
    if names.has_name(index, name) or request.access is None:
        return access_rules.of(index, name).domain
    return request.access.domain


def _with_access(index: oci.Index, request: PutRequest, domain: str) -> oci.Index:
    """Return ``index`` with access for a new name; an existing name must belong to ``domain``."""
    name, access = request.ref.name, request.access or Access()
    if not names.has_name(index, name):
        if access.domain != domain:
            raise NameConflict(
                f"all versions of {name} were removed meanwhile",
                hint="nothing was stored: repeat the command",
            )
        return access_rules.bind(index, name, access)
    current = access_rules.of(index, name).domain
    if current != domain or (request.access and access.domain != current):
        raise OtherDomain(
            f"{name} belongs to {access_rules.describe_domain(current)}",
            hint="choose another name, or remove all its versions first with `onecopy rm`",
        )
    return index
