"""What a store holds, read from the disk without the store's own code.

All content that the jobs store bears a tag, so that a mixture of two versions would show.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.unit.store_kit import check_whole

_TAG = re.compile(rb"TAG-[0-9]{8}")
_ACCESS = "org.onecopy.access."


@dataclass(frozen=True)
class State:
    """``refs``: NAME:VERSION -> the tags in its layers and the domain of these; ``access``: NAME
    -> its record, none if that says nothing.
    """

    refs: dict[str, tuple[frozenset[str], str]] = field(default_factory=dict)
    access: dict[str, dict[str, Any]] = field(default_factory=dict)

    def bound(self, ref: str, tags: frozenset[str], access: dict[str, Any]) -> State:
        """With ``ref`` meaning a new version; ``access`` is for a new name."""
        name = ref.partition(":")[0]
        kept = self.access.get(name, {}) if self.knows(name) else access
        return replace(
            self,
            refs={**self.refs, ref: (tags, kept.get("domain", ""))},
            access=_with(self.access, name, kept),
        )

    def dropped(self, ref: str) -> State:
        """Without ``ref``; with the last version of a name its access goes."""
        rest = replace(self, refs={key: value for key, value in self.refs.items() if key != ref})
        name = ref.partition(":")[0]
        return rest if rest.knows(name) else replace(rest, access=_with(rest.access, name, {}))

    def granted(self, name: str, access: dict[str, Any]) -> State:
        """With other ``access`` to a name."""
        return replace(self, access=_with(self.access, name, access))

    def knows(self, name: str) -> bool:
        """Whether the name has a version."""
        return any(ref.partition(":")[0] == name for ref in self.refs)


def _with(table: dict[str, Any], key: str, value: dict[str, Any]) -> dict[str, Any]:
    rest = {other: record for other, record in table.items() if other != key}
    return {**rest, key: value} if value else rest


def read(root: Path) -> State:
    """What the index names, as it lies on the disk."""
    index = json.loads((root / "index.json").read_bytes())
    refs = {}
    for entry in index["manifests"]:
        manifest = json.loads(_blob(root, entry["digest"]).read_bytes())
        layers = manifest["layers"]
        found = b" ".join(_blob(root, layer["digest"]).read_bytes() for layer in layers)
        tags = frozenset(tag.decode() for tag in _TAG.findall(found))
        domains = {layer.get("annotations", {}).get("org.onecopy.domain", "") for layer in layers}
        assert len(domains) == 1, f"layers of several domains: {domains}"
        refs[entry["annotations"]["org.opencontainers.image.ref.name"]] = (tags, domains.pop())
    access = {
        key.removeprefix(_ACCESS): json.loads(text)
        for key, text in index.get("annotations", {}).items()
    }
    return State(refs, access)


def check(root: Path, leases: set[str], held: set[str]) -> State:
    """Assert that everything is whole and nothing is left over; what the index names.

    ``leases`` are the names that may be in leases/, ``held`` the digests that live guests hold.
    """
    check_whole(root, held)
    found = {path.name for path in (root / "leases").iterdir()}
    assert found == leases, f"leases: {found} in place of {leases}"
    there = {path.name for path in (root / "blobs" / "sha256").iterdir()}
    live = {path.name.partition(".")[0] for path in (root / "live").iterdir()}
    assert live <= there, f"live content of what is gone: {live - there}"
    state = read(root)
    for name in state.access:
        assert state.knows(name), f"access to {name}, which has no version"
    return state


def leftovers(root: Path) -> int:
    """How many things a kill has left in tmp/, and files that are no blobs' or guests'."""
    return sum(1 for _ in (root / "tmp").iterdir())


def _blob(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest.removeprefix("sha256:")
