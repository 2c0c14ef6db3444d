"""The store: artifacts by name, blobs by digest, leases by holder.

Every change runs under one lock, leaves a mark in tmp/ while it lasts, and ends in the same sweep
that follows a crash: so a change that failed is undone the way a killed one is. Readers take no
lock. Not here: the form on disk (oci.py, layout.py), what is wanted (collect.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from onecopy.errors import AlreadyExists, InUse, InvalidInput, NotFound, StoreDamaged
from onecopy.host.lock import is_held
from onecopy.model import Reference, check_name
from onecopy.store import collect, ingest, lease, loading, names, oci, workspace
from onecopy.store.artifact import Artifact, NewLayer
from onecopy.store.disk import file_errors, sync_folder
from onecopy.store.layout import default_root
from onecopy.store.lease import Lease, LeaseRecord
from onecopy.store.opening import open_layout

_T = TypeVar("_T")


class Store:
    """The store in ``root`` (default: `default_root()`), made if missing, swept if need be.

    Any number of processes and threads may use one store at once. Opening raises InvalidInput,
    NotPermitted, NotEnough, Incompatible, StoreDamaged.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._layout = open_layout(root or default_root())
        self.sweep()

    @property
    def root(self) -> Path:
        """The store's folder, absolute."""
        return self._layout.root

    @property
    def cache(self) -> Path:
        """A folder for what can be fetched or made again."""
        return self._layout.cache

    def workspace(self) -> AbstractContextManager[Path]:
        """A private folder on the blobs' file system, removed at the end of the ``with``."""
        return workspace.workspace(self._layout)

    def put(
        self,
        kind: str,
        ref: Reference,
        config: bytes,
        layers: Sequence[NewLayer],
        *,
        replace: bool = True,
    ) -> Artifact:
        """Store and name an artifact, whole or not at all; files in ``layers`` are moved in.

        ``config`` is JSON. The same kind, config and layers always give the same digest. What the
        name meant before goes, or is pending purge while leased. Raises AlreadyExists (with
        ``replace=False`` if the name means another digest; always if it means another kind),
        InvalidInput, NotFound, NotEnough, NotPermitted, StoreDamaged.
        """
        if ref.digest:
            raise InvalidInput(f"{ref} cannot be a new name", hint="use NAME:VERSION")
        oci.artifact_type(kind)
        with file_errors(self.root):
            blobs = [ingest.describe(self._layout, layer) for layer in layers]
        manifest = oci.manifest(kind, config, blobs)
        data = oci.encode(manifest)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._change():
            index = loading.index(self._layout)
            entry = names.claim(index, oci.index_entry(kind, ref, data, now), replace=replace)
            # First what a full disk can refuse: the caller's files stay where they are.
            self._write_blob(manifest.config.digest, config)
            self._write_blob(entry.digest, data)
            for layer, blob in zip(layers, blobs, strict=True):
                ingest.move_in(self._layout, layer, blob.digest)
            sync_folder(self._layout.blobs)
            self._write_index(names.bind(index, entry))
            return self._load(entry)

    def resolve(self, ref: Reference, kind: str | None = None) -> Artifact:
        """The artifact that ``ref`` means.

        Raises NotFound (the hint says what is near; also if it is not a ``kind``), StoreDamaged.
        """
        return self._read(lambda index: self._load(names.find(index, ref, kind)[0]))

    def find(self, ref: Reference, kind: str) -> Artifact | None:
        """The artifact that ``ref`` means, or None; raise StoreDamaged."""
        try:
            return self.resolve(ref, kind)
        except NotFound:
            return None

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """All artifacts (of ``kind``) by name and version; raise StoreDamaged."""
        return self._read(lambda index: [self._load(e) for e in names.ours(index, kind)])

    def remove(self, ref: Reference) -> Artifact:
        """Take the name away and return what it meant; blobs go if nothing else wants them.

        A damaged artifact can be removed: it is returned with no config and no layers. Raises
        NotFound, InUse if it is leased and this is its last name, NotPermitted, NotEnough.
        """
        with self._change():
            index = loading.index(self._layout)
            entries = names.find(index, ref)
            rest = names.drop(index, entries)
            digest = entries[0].digest
            users = self.users(digest)
            if users and all(entry.digest != digest for entry in rest.manifests):
                raise InUse(
                    f"{ref} is in use by {', '.join(users)}",
                    users=users,
                    hint="`onecopy stop` these guests first",
                )
            try:
                artifact = self._load(entries[0])
            except StoreDamaged:
                artifact = loading.bare_artifact(self._layout, entries[0])
            self._write_index(rest)
            return artifact

    def hold(
        self,
        artifact_digests: Sequence[str],
        holder: str,
        info: Mapping[str, str] | None = None,
    ) -> Lease:
        """Lease artifacts, by the digests of their manifests, to ``holder`` (a guest's name).

        Until the last copy of the lease's descriptor is closed, nothing of them is removed.
        Raises AlreadyExists (``holder`` has a live lease), NotFound (removed since it was
        resolved), InvalidInput, StoreDamaged, NotEnough, NotPermitted.
        """
        check_name(holder)
        with file_errors(self.root), self._layout.locked():
            path = lease.path_of(self._layout, holder)
            if is_held(path):
                raise AlreadyExists(
                    f"{holder} runs already", hint="choose another name, or `onecopy stop` it"
                )
            if path.exists():
                # Writing over it would hide that its blobs may go.
                collect.sweep(self._layout)
            record = LeaseRecord(
                holder=holder,
                digests=tuple(artifact_digests),
                blobs=tuple(sorted(self._needs(artifact_digests))),
                info=dict(info or {}),
            )
            return lease.create(self._layout, record)

    def leases(self) -> list[LeaseRecord]:
        """The leases that are held now, by holder; raise StoreDamaged."""
        return lease.scan(self._layout)[0]

    def is_held(self, holder: str) -> bool:
        """Whether ``holder`` has a live lease."""
        return is_held(lease.path_of(self._layout, holder))

    def users(self, digest: str) -> list[str]:
        """Who holds ``digest`` (of a manifest or any blob) now, sorted; raise StoreDamaged."""
        return [record.holder for record in self.leases() if digest in record.blobs]

    def collect(self) -> list[str]:
        """Remove blobs that are neither named nor leased; return their digests.

        Raises StoreDamaged, with nothing removed, if a record cannot be read.
        """
        with file_errors(self.root), self._layout.locked():
            return collect.collect(self._layout)

    def sweep(self) -> None:
        """Remove what killed commands and ended guests left behind; cheap if there is nothing."""
        if collect.sweep_is_due(self._layout):
            # Whoever has the lock now sweeps, or the next one who opens the store does.
            with file_errors(self.root), self._layout.locked(wait=False) as mine:
                if mine:
                    collect.sweep(self._layout)

    def verify(self, artifact: Artifact) -> None:
        """Read and hash every blob of ``artifact``; StoreDamaged says which one is wrong."""
        loading.verify(self._layout, artifact.digest, artifact.ref)

    @contextmanager
    def _change(self) -> Iterator[None]:
        with file_errors(self.root), self._layout.locked():
            # A kill leaves this mark, and so the next one who opens the store sweeps.
            (self._layout.tmp / "change").touch()
            try:
                yield
            finally:
                collect.sweep(self._layout)

    def _read(self, read: Callable[[oci.Index], _T]) -> _T:
        try:
            return read(loading.index(self._layout))
        except StoreDamaged:
            # A writer may have come between index and blob; under the lock none can.
            with file_errors(self.root), self._layout.locked():
                return read(loading.index(self._layout))

    def _needs(self, digests: Sequence[str]) -> set[str]:
        index = loading.index(self._layout)
        entries = {entry.digest: entry for entry in names.ours(index)}
        needed: set[str] = set()
        for digest in digests:
            if digest not in entries:
                raise NotFound(
                    f"{digest} has no name any more", hint="it was removed or replaced: try again"
                )
            needed |= collect.reach(self._layout, entries[digest])
        for blob in map(self._layout.blob, sorted(needed)):
            if not blob.exists():
                raise StoreDamaged(f"{blob} is missing", hint="`onecopy verify` says of what")
        return needed

    def _load(self, entry: oci.Descriptor) -> Artifact:
        return loading.artifact(self._layout, entry)

    def _write_blob(self, digest: str, data: bytes) -> None:
        blob = self._layout.blob(digest)
        # No guest maps these small blobs, so a damaged one may be replaced.
        if not blob.exists() or blob.read_bytes() != data:
            self._layout.write(blob, data, 0o444)

    def _write_index(self, index: oci.Index) -> None:
        self._layout.write(self._layout.index, oci.encode(index))
