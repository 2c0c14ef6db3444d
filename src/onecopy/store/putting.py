"""Storing and naming an artifact, whole or not at all.

Files are measured, and copied from other trust domains, before the store's lock is taken. Not here:
how a file becomes a blob (ingest.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache

import msgspec

from onecopy.errors import InvalidInput, NameConflict, OtherDomain
from onecopy.model import Reference
from onecopy.store import access as who
from onecopy.store import ingest, loading, names, oci
from onecopy.store.access import Access
from onecopy.store.artifact import Artifact, NewLayer
from onecopy.store.change import change, write_blob, write_index
from onecopy.store.disk import file_errors, sync_folder
from onecopy.store.domain import DOMAIN
from onecopy.store.layout import Layout
from onecopy.store.workspace import workspace


class Wanted(msgspec.Struct, frozen=True):
    """What is to be named, and on which conditions; see `Store.put`."""

    kind: str
    ref: Reference
    replace: bool | str = True
    access: Access | None = None


def put(layout: Layout, wanted: Wanted, config: bytes, layers: Sequence[NewLayer]) -> Artifact:
    """See `Store.put`."""
    require_name(wanted.ref)
    oci.artifact_type(wanted.kind)
    domain = _domain(layout, wanted)
    with file_errors(layout.root), ExitStack() as clean:
        # Not made unless it is used: a name can be given on a full disk, too.
        work = cache(lambda: clean.enter_context(workspace(layout)))
        mine = [ingest.in_domain(layout, layer, domain, work) for layer in layers]
        blobs = [ingest.describe(layout, layer, domain, clean) for layer in mine]
        config = ingest.follow(config, layers, blobs)
        with change(layout):
            return _name(layout, wanted, domain, config, list(zip(mine, blobs, strict=True)))


def require_name(ref: Reference) -> None:
    """Raise InvalidInput unless ``ref`` can be a new name."""
    if ref.digest:
        raise InvalidInput(f"{ref} cannot be a new name", hint="use NAME:VERSION")


def require_free(layout: Layout, wanted: Wanted) -> None:
    """See `Store.require_free`."""
    require_name(wanted.ref)
    index = loading.index(layout)
    names.require_same_kind(index, str(wanted.ref), wanted.kind)
    _with_access(index, wanted, _domain(layout, wanted))


def _name(
    layout: Layout,
    wanted: Wanted,
    domain: str,
    config: bytes,
    layers: Sequence[tuple[NewLayer, oci.Descriptor]],
) -> Artifact:
    # Also what has no layer differs from one trust domain to the next.
    mark = {DOMAIN: domain} if domain else {}
    manifest = oci.manifest(wanted.kind, config, [blob for _, blob in layers], mark)
    data = oci.encode(manifest)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    index = loading.index(layout)
    if isinstance(wanted.replace, str):
        names.require_digest(index, wanted.ref, wanted.replace)
    entry = oci.index_entry(wanted.kind, wanted.ref, data, now)
    entry = names.claim(index, entry, replace=bool(wanted.replace))
    index = _with_access(index, wanted, domain)
    # First what a full disk can refuse: the caller's files stay where they are.
    write_blob(layout, manifest.config.digest, config)
    write_blob(layout, entry.digest, data)
    for layer, blob in layers:
        ingest.move_in(layout, layer, blob.digest)
    sync_folder(layout.blobs)
    write_index(layout, names.bind(index, entry))
    return loading.artifact(layout, entry)


def _domain(layout: Layout, wanted: Wanted) -> str:
    """The trust domain that a name is of, or will be."""
    index, name = loading.index(layout), wanted.ref.name
    if names.has_name(index, name) or wanted.access is None:
        return who.of(index, name).domain
    return wanted.access.domain


def _with_access(index: oci.Index, wanted: Wanted, domain: str) -> oci.Index:
    """``index`` with access for a new name; that of one that is there must fit ``domain``."""
    name, access = wanted.ref.name, wanted.access or Access()
    if not names.has_name(index, name):
        if access.domain != domain:
            raise NameConflict(
                f"all versions of {name} were removed meanwhile",
                hint="nothing was stored: do the same again",
            )
        return who.bind(index, name, access)
    there = who.of(index, name).domain
    if there != domain or (wanted.access and access.domain != there):
        raise OtherDomain(
            f"{name} belongs to {who.described(there)}",
            hint="choose another name, or `onecopy rm` all its versions first",
        )
    return index
