"""The names in the index: pure functions from one index to the next.

Entries that other tools wrote are kept as they are and never shown. Not here: reading and writing
``index.json`` (collect.py, store.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from onecopy.errors import AlreadyExists, InvalidInput, NameConflict, NotFound
from onecopy.model import Reference, in_order
from onecopy.store.oci import INDEX_TYPE, Descriptor, Index


def reference(entry: Descriptor) -> Reference | None:
    """The name and version of ``entry``; None if it is not an artifact of ours."""
    try:
        ref = Reference.parse(entry.ref)
    except InvalidInput:
        return None
    return ref if entry.kind and str(ref) == entry.ref and not ref.digest else None


def ours(index: Index, kind: str | None = None) -> list[Descriptor]:
    """Our entries (of ``kind``), by name and version."""
    named = [(ref, entry) for entry in index.manifests if (ref := reference(entry))]
    named.sort(key=lambda pair: (in_order(pair[0].name), in_order(pair[0].version)))
    return [entry for _, entry in named if kind in (None, entry.kind)]


def find(index: Index, ref: Reference, kind: str | None = None) -> list[Descriptor]:
    """What ``ref`` means: one entry, or every version of the name with that digest.

    Raises NotFound, also if it is not a ``kind``; InvalidInput if the digest is too short.
    """
    entries = ours(index)
    found = [entry for entry in entries if _means(ref, entry)]
    require_one(ref, (entry.digest for entry in found))
    if not found:
        raise NotFound(f"there is no {kind or 'artifact'} {ref}", hint=_near(entries, ref, kind))
    right = [entry for entry in found if kind in (None, entry.kind)]
    if not right:
        require_kind(str(ref), found[0].kind, kind)
    return right


def matching(index: Index, ref: Reference) -> list[Descriptor]:
    """All that ``ref`` may mean: of a short digest several."""
    return [entry for entry in ours(index) if _means(ref, entry)]


def require_one(ref: Reference, digests: Iterable[str]) -> None:
    """Raise InvalidInput if a short digest is that of several."""
    found = sorted(set(digests))
    if ref.digest and len(found) > 1:
        raise InvalidInput(
            f"{ref} may be {', '.join(found[:-1])} or {found[-1]}",
            hint="give more digits of the one that is meant",
        )


def is_digest_of(ref: Reference, name: str, digest: str) -> bool:
    """Whether ``ref`` names this by its digest, or the beginning of it."""
    return ref.name == name and bool(ref.digest) and digest.startswith(ref.digest or "")


def require_kind(ref: str, found: str, kind: str | None) -> None:
    """Raise NotFound unless what is ``found`` is a ``kind``; None wants no certain one."""
    if kind not in (None, found):
        hint = _USES.get((found, kind or ""), "`onecopy ls` shows what there is")
        raise NotFound(f"{ref} is a {found}, not a {kind}", hint=hint.format(ref))


#: (what it is, what was wanted) -> what can be done with it.
_USES = {
    ("segment", "system"): "boot it with `onecopy boot {0}`, or save it as a system with "
    "`onecopy save NAME --root {0}`",
    ("system", "segment"): "start clones of it with `onecopy run {0}`",
    ("kernel", "system"): "boot it with `onecopy boot {0}`, if it is a bare kernel",
}


def _means(ref: Reference, entry: Descriptor) -> bool:
    if ref.digest:
        return is_digest_of(ref, entry.ref.partition(":")[0], entry.digest)
    return entry.ref == str(ref)


def _near(entries: Sequence[Descriptor], ref: Reference, kind: str | None) -> str:
    import difflib

    known = [entry.ref for entry in entries if kind in (None, entry.kind)]
    near = [text for text in known if text.partition(":")[0] == ref.name]
    near = near or difflib.get_close_matches(f"{ref.name}:{ref.version}", known)
    question = f"did you mean {' or '.join(near[:3])}? " if near else ""
    return f"{question}`onecopy ls` shows what there is"


def has_name(index: Index, name: str) -> bool:
    """Whether ``name`` has a version."""
    return any(entry.ref.partition(":")[0] == name for entry in ours(index))


def require_name(index: Index, name: str) -> None:
    """Raise NotFound unless ``name`` has a version."""
    if not has_name(index, name):
        hint = _near(ours(index), Reference(name), None)
        raise NotFound(f"there is nothing of the name {name}", hint=hint)


def require_digest(index: Index, ref: Reference, expected: str) -> None:
    """Raise NameConflict unless ``ref`` means the digest ``expected``."""
    found = next((entry.digest for entry in ours(index) if entry.ref == str(ref)), None)
    if found != expected:
        now = f"means {found} by now" if found else "is gone"
        raise NameConflict(
            f"{ref} {now}, not {expected}: somebody else has changed it meanwhile",
            hint="nothing was lost: give the new version another name or version, with --as",
        )


def claim(index: Index, entry: Descriptor, *, replace: bool) -> Descriptor:
    """``entry``, or the one that gives its name to the same digest already.

    Raises AlreadyExists if the name means something of another kind, or, without ``replace``,
    another digest.
    """
    require_same_kind(index, entry.ref, entry.kind)
    for old in index.manifests:
        if old.ref != entry.ref:
            continue
        if old.digest == entry.digest:
            return old
        if not replace:
            raise AlreadyExists(
                f"there is another {entry.kind} {entry.ref}",
                hint="choose another version, or allow to replace it",
            )
    return entry


def require_same_kind(index: Index, ref: str, kind: str) -> None:
    """Raise AlreadyExists if ``ref`` (NAME:VERSION) means something that is not a ``kind``."""
    for old in index.manifests:
        if old.ref == ref and old.kind != kind:
            raise AlreadyExists(
                f"{ref} is a {old.kind or 'manifest of another tool'}",
                hint="choose another name, or `onecopy rm` it first",
            )


def bind(index: Index, entry: Descriptor) -> Index:
    """``index`` with the name of ``entry`` meaning ``entry`` and nothing else."""
    others = tuple(old for old in index.manifests if old.ref != entry.ref)
    return msgspec.structs.replace(index, media_type=INDEX_TYPE, manifests=(*others, entry))


def drop(index: Index, entries: Sequence[Descriptor]) -> Index:
    """``index`` without ``entries``."""
    rest = tuple(old for old in index.manifests if old not in entries)
    return msgspec.structs.replace(index, manifests=rest)
