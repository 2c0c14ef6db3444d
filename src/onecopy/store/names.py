"""The names in the index: pure functions that turn one index into the next.

Entries of other tools are kept as they are and never shown.

Not here: reading and writing ``index.json`` (loading.py, change.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from onecopy.errors import AlreadyExists, InvalidInput, NameConflict, NotFound, did_you_mean
from onecopy.model import Reference, in_order
from onecopy.store.oci import INDEX_TYPE, Descriptor, Index


def reference(entry: Descriptor) -> Reference | None:
    """Return the name and version of an entry; None if it is not an artifact of onecopy."""
    try:
        ref = Reference.parse(entry.ref)
    except InvalidInput:
        return None
    return ref if entry.kind and str(ref) == entry.ref and not ref.digest else None


def ours(index: Index, kind: str | None = None) -> list[Descriptor]:
    """List onecopy's entries (of ``kind``), ordered by name and version."""
    named = [(ref, entry) for entry in index.manifests if (ref := reference(entry))]
    named.sort(key=lambda pair: (in_order(pair[0].name), in_order(pair[0].version)))
    return [entry for _, entry in named if kind in (None, entry.kind)]


def find(index: Index, ref: Reference, kind: str | None = None) -> list[Descriptor]:
    """Find the entries for a reference: one entry, or all versions of the name with that digest.

    Raises:
        NotFound: nothing matches, or it is not a ``kind``.
        InvalidInput: the short digest is ambiguous.
    """
    entries = ours(index)
    found = [entry for entry in entries if _matches(ref, entry)]
    require_one(ref, (entry.digest for entry in found))
    if not found:
        raise NotFound(f"there is no {kind or 'artifact'} {ref}", hint=_suggest(entries, ref, kind))
    right = [entry for entry in found if kind in (None, entry.kind)]
    if not right:
        require_kind(str(ref), found[0].kind, kind)
    return right


def matching(index: Index, ref: Reference) -> list[Descriptor]:
    """List all entries that a reference may refer to; a short digest may match several."""
    return [entry for entry in ours(index) if _matches(ref, entry)]


def require_one(ref: Reference, digests: Iterable[str]) -> None:
    """Require that a short digest is unique.

    Raises:
        InvalidInput: it matches several.
    """
    found = sorted(set(digests))
    if ref.digest and len(found) > 1:
        raise InvalidInput(
            f"{ref} is ambiguous: it may be {', '.join(found[:-1])} or {found[-1]}",
            hint="give more digits of the digest",
        )


def is_digest_of(ref: Reference, name: str, digest: str) -> bool:
    """Whether ``ref`` refers to the digest ``digest`` of ``name``, by all or some of its digits."""
    return ref.name == name and bool(ref.digest) and digest.startswith(ref.digest or "")


def require_kind(ref: str, found: str, kind: str | None) -> None:
    """Require that an artifact is a ``kind``; None accepts any kind.

    Raises:
        NotFound: it is of another kind.
    """
    if kind not in (None, found):
        hint = _USES.get((found, kind or ""), "`onecopy ls` lists all artifacts")
        raise NotFound(f"{ref} is a {found}, not a {kind}", hint=hint.format(ref))


#: (kind found, kind expected) -> how to use what was found.
_USES = {
    (
        "segment",
        "system",
    ): "`onecopy boot {0}` boots it; `onecopy save NAME --root {0}` boots and saves "
    "it, for guests that start at once",
    (
        "system",
        "segment",
    ): "`onecopy run {0}` starts guests from a saved system; `onecopy ls --kind segment` "
    "lists segments",
    ("kernel", "system"): "`onecopy boot {0}` boots a bare kernel",
}


def _matches(ref: Reference, entry: Descriptor) -> bool:
    if ref.digest:
        return is_digest_of(ref, entry.ref.partition(":")[0], entry.digest)
    return entry.ref == str(ref)


def _suggest(entries: Sequence[Descriptor], ref: Reference, kind: str | None) -> str:
    import difflib

    known = [entry.ref for entry in entries if kind in (None, entry.kind)]
    near = [text for text in known if text.partition(":")[0] == ref.name]
    near = near or difflib.get_close_matches(f"{ref.name}:{ref.version}", known)
    return f"{did_you_mean(near[:3])}`onecopy ls` lists all artifacts"


def has_name(index: Index, name: str) -> bool:
    """Whether ``name`` has a version."""
    return any(entry.ref.partition(":")[0] == name for entry in ours(index))


def require_name(index: Index, name: str) -> None:
    """Require that a name has a version.

    Raises:
        NotFound: it has none.
    """
    if not has_name(index, name):
        hint = _suggest(ours(index), Reference(name), None)
        raise NotFound(f"nothing has the name {name}", hint=hint)


def require_digest(index: Index, ref: Reference, expected: str) -> None:
    """Require that a reference means the digest ``expected``.

    Raises:
        NameConflict: it means another one or nothing.
    """
    found = next((entry.digest for entry in ours(index) if entry.ref == str(ref)), None)
    if found != expected:
        now = f"now refers to {found}" if found else "no longer exists"
        raise NameConflict(
            f"{ref} {now}; expected {expected}: another command changed it meanwhile",
            hint="nothing was lost: store the result under another name or version, with --as",
        )


def claim(index: Index, entry: Descriptor, *, replace: bool) -> Descriptor:
    """Return ``entry``, or the existing entry that gives its name to the same digest.

    Raises:
        AlreadyExists: the name refers to another kind or, without ``replace``, to another digest.
    """
    require_same_kind(index, entry.ref, entry.kind)
    for old in index.manifests:
        if old.ref != entry.ref:
            continue
        if old.digest == entry.digest:
            return old
        if not replace:
            raise AlreadyExists(
                f"a different {entry.kind} {entry.ref} exists",
                hint="choose another version, or allow replacing it",
            )
    return entry


def require_same_kind(index: Index, ref: str, kind: str) -> None:
    """Require that a name (NAME:VERSION) is free or refers to a ``kind``.

    Raises:
        AlreadyExists: it refers to another kind.
    """
    for old in index.manifests:
        if old.ref == ref and old.kind != kind:
            raise AlreadyExists(
                f"{ref} is a {old.kind or 'manifest of another tool'}",
                hint="choose another name, or remove it first with `onecopy rm`",
            )


def bind(index: Index, entry: Descriptor) -> Index:
    """Return ``index`` with the name of ``entry`` referring to ``entry`` alone."""
    others = tuple(old for old in index.manifests if old.ref != entry.ref)
    return msgspec.structs.replace(index, media_type=INDEX_TYPE, manifests=(*others, entry))


def drop(index: Index, entries: Sequence[Descriptor]) -> Index:
    """Return ``index`` without ``entries``."""
    rest = tuple(old for old in index.manifests if old not in entries)
    return msgspec.structs.replace(index, manifests=rest)
