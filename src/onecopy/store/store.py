"""The store: artifacts by name, blobs by digest, leases by holder.

Every change runs under one lock, has a marker in tmp/ while it lasts, and ends with the sweep that
also follows a crash. So a failed change is undone like one that was killed. Readers take no lock.

Not here: formats on disk (oci.py, layout.py), and which blobs are needed (collect.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from onecopy.errors import InUse, NotFound, StoreDamaged
from onecopy.linux.lock import is_held
from onecopy.model import Reference, check_name, check_new_name, in_order
from onecopy.store import access as access_rules
from onecopy.store import collect, holding, lease, live, loading, names, oci, putting, workspace
from onecopy.store.access import Access
from onecopy.store.artifact import Artifact, Layer, NewLayer
from onecopy.store.change import change, write_index
from onecopy.store.disk import file_errors
from onecopy.store.layout import default_root
from onecopy.store.lease import Lease, LeaseRecord
from onecopy.store.opening import open_layout
from onecopy.store.putting import PutRequest

_T = TypeVar("_T")


class Store:
    """The store at ``root`` (default: `default_root()`).

    Opening creates it if missing, and sweeps it if needed. Any number of processes and threads may
    use it at the same time.

    Raises:
        InvalidInput: the path is not supported or is used for something else.
        NotPermitted: this user may not change the store.
        InsufficientResources: the disk is full.
        Incompatible: the file system or the store's version is not supported.
        StoreDamaged: a record is missing or not valid.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._layout = open_layout(root or default_root())
        self.sweep()

    @property
    def root(self) -> Path:
        """The store's directory, absolute."""
        return self._layout.root

    @property
    def cache(self) -> Path:
        """A directory for files that can be fetched or made again."""
        return self._layout.cache

    def workspace(self) -> AbstractContextManager[Path]:
        """Create a private directory in the store, removed at the end of the context."""
        return workspace.workspace(self._layout)

    def put(
        self,
        kind: str,
        ref: Reference,
        config: bytes,
        layers: Sequence[NewLayer],
        *,
        replace: bool | str = True,
        access: Access | None = None,
    ) -> Artifact:
        """Store and name an artifact atomically; files in ``layers`` are moved in.

        The same kind, config, layers and trust domain always give the same digest. The artifact
        that had the name before is removed, or pending purge while it is leased.

        Args:
            config: JSON.
            replace: what the name may refer to before: anything (True), nothing else (False), or
                one digest.
            access: the access to a new name; an existing name keeps its own.

        Raises:
            AlreadyExists: the name refers to another kind or, with ``replace=False``, another
                digest.
            NameConflict: the name does not refer to the digest ``replace``.
            OtherDomain: the name belongs to another trust domain than ``access``.
            InvalidInput: the name is not valid or is reserved (``onecopy-``).
            NotFound: a layer's file or blob does not exist.
            InsufficientResources: the disk is full.
            NotPermitted: this user may not change the store.
            StoreDamaged: a record or the disk is damaged.
        """
        check_new_name(ref.name)
        request = PutRequest(kind, ref, replace, access)
        return putting.put(self._layout, request, config, layers)

    def put_own(
        self, kind: str, ref: Reference, config: bytes, layers: Sequence[NewLayer]
    ) -> Artifact:
        """Store like `put`, under a name with the reserved prefix ``onecopy-``."""
        return putting.put(self._layout, PutRequest(kind, ref), config, layers)

    def require_free(self, kind: str, ref: Reference, access: Access | None = None) -> None:
        """Check the name like `put`, before there is content.

        Raises:
            AlreadyExists: the name refers to another kind.
            OtherDomain: the name belongs to another trust domain than ``access``.
            InvalidInput: the name is not valid.
            StoreDamaged: a record is damaged.
        """
        putting.require_free(self._layout, PutRequest(kind, ref, access=access))

    def tag(
        self,
        source: Reference,
        target: Reference,
        *,
        domain: str | None = None,
        own: bool = False,
    ) -> Artifact:
        """Give an artifact a further name; in another trust domain it is copied.

        A new name inherits the access of the old one; in another domain without its grants. Raises
        like `resolve` and `put`.

        Args:
            own: use a name with the reserved prefix ``onecopy-``.
        """
        if not own:
            check_new_name(target.name)
        found = self.resolve(source)
        access = self.access(found.name)
        if domain is not None and domain != access.domain:
            access = Access(domain=access_rules.check_domain(domain), restricted=access.restricted)
        layers = [NewLayer.of(layer) for layer in found.layers]
        keeps = None if domain is None and self._knows(target.name) else access
        request = PutRequest(found.kind, target, access=keeps)
        return putting.put(self._layout, request, found.config, layers)

    def _knows(self, name: str) -> bool:
        return names.has_name(loading.index(self._layout), name)

    def access(self, name: str) -> Access:
        """Return who may load ``name``; raise StoreDamaged."""
        return self._read(lambda index: access_rules.of(index, name))

    def restrict(self, name: str, alter: Callable[[Access], Access]) -> Access:
        """Change who may load a name; its trust domain stays.

        Raises:
            NotFound: the name has no versions.
            NotPermitted: this user may not change the store.
            InsufficientResources: the disk is full.
            StoreDamaged: a record is damaged.
        """
        with change(self._layout):
            index = loading.index(self._layout)
            names.require_name(index, name)
            now = access_rules.of(index, name)
            # The blobs belong to this trust domain.
            access = structs.replace(alter(now), domain=now.domain)
            write_index(self._layout, access_rules.bind(index, name, access))
            return access

    def require_access(self, names_: Iterable[str], guest: str, domain: str) -> None:
        """Require that a guest of ``domain`` may load all names.

        Raises:
            Restricted: one is restricted, and no grant matches the guest.
            OtherDomain: one belongs to another trust domain.
        """
        index = self._read(lambda index: index)
        for name in names_:
            access_rules.require(name, access_rules.of(index, name), guest, domain)

    def resolve(self, ref: Reference, kind: str | None = None) -> Artifact:
        """Return the artifact that a reference means; by a digest, also one that is pending purge.

        Raises:
            NotFound: nothing matches, or it is not a ``kind``; the hint suggests similar names.
            InvalidInput: the short digest is ambiguous.
            StoreDamaged: a record is damaged.
        """
        held = self.pending() if ref.digest else []
        held = [each for each in held if names.is_digest_of(ref, each.name, each.digest)]
        return self._read(lambda index: self._find(index, held, ref, kind))

    def _find(
        self, index: oci.Index, held: Sequence[Artifact], ref: Reference, kind: str | None
    ) -> Artifact:
        named = [entry.digest for entry in names.matching(index, ref)]
        names.require_one(ref, [*(each.digest for each in held), *named])
        if named or not held:
            return self._load(names.find(index, ref, kind)[0])
        names.require_kind(held[0].ref, held[0].kind, kind)
        return held[0]

    def pending(self) -> list[Artifact]:
        """List artifacts that are pending purge: removed or replaced, but still leased."""
        return self._read(
            lambda index: [self._load(entry) for entry in holding.pending(self._layout, index)]
        )

    def held(self, holder: str) -> list[Artifact]:
        """List what a guest leases, including artifacts that no longer have a name.

        Raises:
            StoreDamaged: a record is damaged.
        """
        return self._read(
            lambda index: [self._load(e) for e in holding.held(self._layout, index, holder)]
        )

    def find(self, ref: Reference, kind: str) -> Artifact | None:
        """Return the artifact that a reference means, or None; raise StoreDamaged."""
        try:
            return self.resolve(ref, kind)
        except NotFound:
            return None

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """List all artifacts (of ``kind``), ordered by name and version.

        Raises:
            StoreDamaged: a record is damaged.
        """
        return self._read(lambda index: [self._load(e) for e in names.ours(index, kind)])

    def remove(self, ref: Reference, *, in_use: bool = False) -> Artifact:
        """Remove a name; blobs that nothing else needs are removed too.

        Args:
            in_use: remove it even if it is leased; it is then pending purge.

        Returns:
            The artifact; without config and layers if it was damaged.

        Raises:
            NotFound: nothing has the name.
            InUse: it is leased, and this is its last name.
            NotPermitted: this user may not change the store.
            InsufficientResources: the disk is full.
        """
        with change(self._layout):
            index = loading.index(self._layout)
            entries = names.find(index, ref)
            rest = names.drop(index, entries)
            digest = entries[0].digest
            users = self.users(digest)
            if users and not in_use and all(entry.digest != digest for entry in rest.manifests):
                raise InUse(
                    f"{ref} is in use by {', '.join(users)}",
                    users=users,
                    hint=_release_hint(users),
                )
            try:
                artifact = self._load(entries[0])
            except StoreDamaged:
                artifact = loading.bare_artifact(self._layout, entries[0])
            write_index(self._layout, rest)
            return artifact

    def hold(
        self,
        artifact_digests: Sequence[str],
        holder: str,
        info: Mapping[str, str] | None = None,
    ) -> Lease:
        """Lease artifacts, named by the digests of their manifests, to a holder.

        None of their blobs is removed until the last copy of the lease's descriptor is closed.

        Args:
            holder: the guest's name.
            info: data to store with the lease.

        Raises:
            AlreadyExists: the holder has a live lease.
            NotFound: an artifact was removed after it was resolved.
            InvalidInput: the holder's name is not valid.
            StoreDamaged: a record or blob is damaged.
            InsufficientResources: the disk is full.
            NotPermitted: this user may not change the store.
        """
        check_name(holder)
        with file_errors(self.root), self._layout.locked():
            return holding.hold(self._layout, artifact_digests, holder, info or {})

    def rename_holder(self, holder: str, name: str) -> None:
        """Rename a holder without further leases.

        Raises:
            AlreadyExists: the new name has a live lease.
        """
        check_name(name)
        with file_errors(self.root), self._layout.locked():
            holding.rename(self._layout, holder, name)

    def extend(self, holder: str, artifact_digests: Sequence[str]) -> Lease:
        """Create a further lease; raise like `hold`, and NotFound without a first lease."""
        with file_errors(self.root), self._layout.locked():
            return holding.extend(self._layout, artifact_digests, holder)

    def leases(self) -> list[LeaseRecord]:
        """List the held leases, by holder; raise StoreDamaged."""
        return lease.scan(self._layout)[0]

    def require_unheld(self, holder: str) -> None:
        """Require that ``holder`` has no live lease.

        Raises:
            AlreadyExists: it has one.
        """
        holding.require_unheld(self._layout, holder)

    def is_held(self, holder: str) -> bool:
        """Whether ``holder`` has a live lease."""
        return lease.is_live(self._layout, holder)

    def is_locked(self, holder: str) -> bool:
        """Whether ``holder`` locks its lease; after its end only a compromised VMM still does."""
        return is_held(lease.path_of(self._layout, holder))

    def users(self, digest: str) -> list[str]:
        """List the holders of a manifest or blob, sorted.

        Raises:
            StoreDamaged: a record is damaged.
        """
        found = {each.holder for each in self.leases() if digest in each.blobs}
        return sorted(found, key=in_order)

    def collect(self) -> list[str]:
        """Remove blobs that are neither named nor leased.

        Returns:
            Their digests.

        Raises:
            StoreDamaged: a record cannot be read, so nothing is removed.
        """
        with file_errors(self.root), self._layout.locked():
            return collect.collect(self._layout)

    def sweep(self) -> None:
        """Remove what killed commands and ended guests left behind; cheap if there is nothing."""
        if collect.sweep_is_due(self._layout):
            # If the lock is taken, its holder sweeps, or the next command that opens the store.
            with file_errors(self.root), self._layout.locked(wait=False) as mine:
                if mine:
                    collect.sweep(self._layout)

    def live(self, layer: Layer, segment: str, number: int, size: int) -> Path:
        """Return the live content of an SC range, created if missing.

        Raises:
            InsufficientResources: the disk is full.
        """
        return live.ensure(self._layout, segment, number, layer.path, size)

    def verify(self, artifact: Artifact) -> None:
        """Read and hash every blob of an artifact.

        Raises:
            StoreDamaged: a blob is damaged; the message names it.
        """
        loading.verify(self._layout, artifact.digest, artifact.ref)

    def _read(self, read: Callable[[oci.Index], _T]) -> _T:
        try:
            return read(loading.index(self._layout))
        except StoreDamaged:
            # A change may have happened between reading the index and a blob; under the lock none
            # can.
            with file_errors(self.root), self._layout.locked():
                return read(loading.index(self._layout))

    def _load(self, entry: oci.Descriptor) -> Artifact:
        return loading.artifact(self._layout, entry)


def _release_hint(users: Sequence[str]) -> str:
    if all(user.startswith(lease.PIN) for user in users):
        return "unpin it first with `onecopy preload --unpin`"
    return (
        "stop these guests first with `onecopy stop`, or use rm --pending to remove it "
        "with the last of them"
    )
