"""The store: artifacts by name, blobs by digest, leases by holder.

Every change runs under one lock, leaves a mark in tmp/ while it lasts, and ends in the same sweep
that follows a crash: so a change that failed is undone the way a killed one is. Readers take no
lock. Not here: the form on disk (oci.py, layout.py), what is wanted (collect.py).
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
from onecopy.store import access as who
from onecopy.store import collect, holding, lease, live, loading, names, oci, putting, workspace
from onecopy.store.access import Access
from onecopy.store.artifact import Artifact, Layer, NewLayer
from onecopy.store.change import change, write_index
from onecopy.store.disk import file_errors
from onecopy.store.layout import default_root
from onecopy.store.lease import Lease, LeaseRecord
from onecopy.store.opening import open_layout
from onecopy.store.putting import Wanted

_T = TypeVar("_T")


class Store:
    """The store in ``root`` (default: `default_root()`), made if missing, swept if need be.

    Any number of processes and threads may use one store at once. Opening raises InvalidInput,
    NotPermitted, InsufficientResources, Incompatible, StoreDamaged.
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
        replace: bool | str = True,
        access: Access | None = None,
    ) -> Artifact:
        """Store and name an artifact, whole or not at all; files in ``layers`` are moved in.

        ``config`` is JSON. The same kind, config, layers and trust domain always give the same
        digest. What the name meant before goes, or is pending purge while leased. A new name gets
        ``access``; an existing name keeps its own. ``replace`` says what the name may mean before:
        anything (True), nothing else (False), or one digest.

        Raises AlreadyExists (with ``replace=False`` if the name means another digest; always if it
        means another kind), NameConflict (the name does not mean the digest ``replace``),
        OtherDomain (the name is of another trust domain than ``access``), InvalidInput (also a name
        that begins with ``onecopy-``), NotFound, InsufficientResources, NotPermitted, StoreDamaged.
        """
        check_new_name(ref.name)
        wanted = Wanted(kind, ref, replace, access)
        return putting.put(self._layout, wanted, config, layers)

    def put_own(
        self, kind: str, ref: Reference, config: bytes, layers: Sequence[NewLayer]
    ) -> Artifact:
        """Store an artifact of onecopy's own as `put` does: its name begins with ``onecopy-``."""
        return putting.put(self._layout, Wanted(kind, ref), config, layers)

    def require_free(self, kind: str, ref: Reference, access: Access | None = None) -> None:
        """Raise what `put` would for the name alone, before there is anything to put.

        AlreadyExists (it means another kind), OtherDomain, InvalidInput, StoreDamaged.
        """
        putting.require_free(self._layout, Wanted(kind, ref, access=access))

    def tag(
        self,
        source: Reference,
        target: Reference,
        *,
        domain: str | None = None,
        own: bool = False,
    ) -> Artifact:
        """Give what ``source`` means a further name; into another trust domain it is copied.

        A new name gets the access of the old one, and in another domain none of its grants; ``own``
        names begin with ``onecopy-``. Raises as `resolve` and `put` do.
        """
        if not own:
            check_new_name(target.name)
        found = self.resolve(source)
        access = self.access(found.name)
        if domain is not None and domain != access.domain:
            access = Access(domain=who.check_domain(domain), restricted=access.restricted)
        layers = [NewLayer.of(layer) for layer in found.layers]
        keeps = None if domain is None and self._knows(target.name) else access
        wanted = Wanted(found.kind, target, access=keeps)
        return putting.put(self._layout, wanted, found.config, layers)

    def _knows(self, name: str) -> bool:
        return names.has_name(loading.index(self._layout), name)

    def access(self, name: str) -> Access:
        """Who may load ``name``; raise StoreDamaged."""
        return self._read(lambda index: who.of(index, name))

    def restrict(self, name: str, alter: Callable[[Access], Access]) -> Access:
        """Change who may load a name, but not its trust domain; return it.

        Raises NotFound, NotPermitted, InsufficientResources, StoreDamaged.
        """
        with change(self._layout):
            index = loading.index(self._layout)
            names.require_name(index, name)
            now = who.of(index, name)
            # Its blobs are of this trust domain.
            access = structs.replace(alter(now), domain=now.domain)
            write_index(self._layout, who.bind(index, name, access))
            return access

    def require_access(self, names_: Iterable[str], guest: str, domain: str) -> None:
        """Raise Restricted or OtherDomain unless a guest of ``domain`` may load all of these."""
        index = self._read(lambda index: index)
        for name in names_:
            who.require(name, who.of(index, name), guest, domain)

    def resolve(self, ref: Reference, kind: str | None = None) -> Artifact:
        """The artifact that ``ref`` means.

        By its digest, which can be short where it is unique, also what is pending purge. Raises
        NotFound (the hint says what is near; also if it is not a ``kind``), InvalidInput (a short
        digest of several), StoreDamaged.
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
        """What was removed or replaced and is still leased (pending purge); raise StoreDamaged."""
        return self._read(
            lambda index: [self._load(entry) for entry in holding.pending(self._layout, index)]
        )

    def held(self, holder: str) -> list[Artifact]:
        """What a guest has leased now, also if it has no name any more; raise StoreDamaged."""
        return self._read(
            lambda index: [self._load(e) for e in holding.held(self._layout, index, holder)]
        )

    def find(self, ref: Reference, kind: str) -> Artifact | None:
        """The artifact that ``ref`` means, or None; raise StoreDamaged."""
        try:
            return self.resolve(ref, kind)
        except NotFound:
            return None

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """All artifacts (of ``kind``) by name and version; raise StoreDamaged."""
        return self._read(lambda index: [self._load(e) for e in names.ours(index, kind)])

    def remove(self, ref: Reference, *, in_use: bool = False) -> Artifact:
        """Take the name away and return what it meant; blobs go if nothing else wants them.

        With ``in_use`` also if it is leased: it is pending purge then. A damaged artifact can be
        removed: it is returned with no config and no layers. Raises NotFound, InUse if it is leased
        and this is its last name, NotPermitted, InsufficientResources.
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
        """Lease artifacts, by the digests of their manifests, to ``holder`` (a guest's name).

        Until the last copy of the lease's descriptor is closed, nothing of them is removed.
        Raises AlreadyExists (``holder`` has a live lease), NotFound (removed since it was
        resolved), InvalidInput, StoreDamaged, InsufficientResources, NotPermitted.
        """
        check_name(holder)
        with file_errors(self.root), self._layout.locked():
            return holding.hold(self._layout, artifact_digests, holder, info or {})

    def rename_holder(self, holder: str, name: str) -> None:
        """Let a holder that has extended nothing have another name; raise AlreadyExists."""
        check_name(name)
        with file_errors(self.root), self._layout.locked():
            holding.rename(self._layout, holder, name)

    def extend(self, holder: str, artifact_digests: Sequence[str]) -> Lease:
        """A further lease for a holder; raises as `hold`, and NotFound if it has no first one."""
        with file_errors(self.root), self._layout.locked():
            return holding.extend(self._layout, artifact_digests, holder)

    def leases(self) -> list[LeaseRecord]:
        """The leases that are held now, by holder; raise StoreDamaged."""
        return lease.scan(self._layout)[0]

    def require_unheld(self, holder: str) -> None:
        """Raise AlreadyExists if ``holder`` has a live lease."""
        holding.require_unheld(self._layout, holder)

    def is_held(self, holder: str) -> bool:
        """Whether ``holder`` has a live lease."""
        return lease.is_live(self._layout, holder)

    def is_locked(self, holder: str) -> bool:
        """Whether ``holder`` has not let go of its lease, as only a VMM that misbehaves does."""
        return is_held(lease.path_of(self._layout, holder))

    def users(self, digest: str) -> list[str]:
        """Who holds ``digest`` (of a manifest or any blob) now, sorted; raise StoreDamaged."""
        found = {each.holder for each in self.leases() if digest in each.blobs}
        return sorted(found, key=in_order)

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

    def live(self, layer: Layer, segment: str, number: int, size: int) -> Path:
        """Return an SC range's live content, made if need be; raise InsufficientResources."""
        return live.ensure(self._layout, segment, number, layer.path, size)

    def verify(self, artifact: Artifact) -> None:
        """Read and hash every blob of ``artifact``; StoreDamaged says which one is wrong."""
        loading.verify(self._layout, artifact.digest, artifact.ref)

    def _read(self, read: Callable[[oci.Index], _T]) -> _T:
        try:
            return read(loading.index(self._layout))
        except StoreDamaged:
            # A writer may have come between index and blob; under the lock none can.
            with file_errors(self.root), self._layout.locked():
                return read(loading.index(self._layout))

    def _load(self, entry: oci.Descriptor) -> Artifact:
        return loading.artifact(self._layout, entry)


def _release_hint(users: Sequence[str]) -> str:
    if all(user.startswith(lease.PIN) for user in users):
        return "`onecopy preload --unpin` it first"
    return "`onecopy stop` these guests first, or let it go with the last of them: rm --pending"
