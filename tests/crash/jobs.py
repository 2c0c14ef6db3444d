"""What is killed: commands and calls that change a store, and what each would make of it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from onecopy import cli
from onecopy.model import Reference
from onecopy.store import Access, NewLayer, Store
from tests.crash.state import State

NAMES = ("app", "data", "lab", "root")
VERSIONS = ("1", "2", "latest")
#: What another command may be changing meanwhile.
BESIDE = "beside:latest"
_RAM = 256 << 10
_PMEM = "application/vnd.onecopy.test.v1"
_numbers = count(1)


@dataclass(frozen=True)
class Job:
    """``run`` in a process of its own; done, it leads from ``before`` to ``after``."""

    run: Callable[[], object]
    after: State


class Maker:
    """Draws jobs for a store; ``outside`` is a folder for what is built from."""

    def __init__(self, root: Path, outside: Path, dice: random.Random) -> None:
        self._root = root
        self._outside = outside
        self._dice = dice

    def job(self, kind: str, before: State) -> Job | None:
        """A job of that kind, or None if the store has nothing for it now."""
        made: Job | None = getattr(self, kind)(before)
        return made

    def put(self, before: State) -> Job:
        """Several new files under a name, new or not."""
        ref, tag, access = self._target()

        def run() -> None:
            store = Store(self._root)
            with store.workspace() as work:
                store.put(
                    "segment",
                    Reference.parse(ref),
                    b'{"tag":"%s"}' % tag.encode(),
                    [_layer(work / f"{n}", tag, n) for n in range(3)],
                    access=Access(**access) if access else None,
                )

        return Job(run, before.bound(ref, frozenset({tag}), access))

    def pull(self, before: State) -> Job | None:
        """As another tool's image comes in: many small layers, one of them stored already."""
        if not _mine(before):
            return None
        source = self._dice.choice(_mine(before))
        ref, tag, access = self._target()

        def run() -> None:
            store = Store(self._root)
            there = store.resolve(Reference.parse(source)).layers[0]
            with store.workspace() as work:
                layers = [_layer(work / f"{n}", tag, n, 4 << 10) for n in range(8)]
                layers.insert(3, NewLayer(None, _PMEM, {}, there.digest, there.size))
                given = Access(**access) if access else None
                store.put("segment", Reference.parse(ref), b"{}", layers, access=given)

        # The first layer has the artifact's own tag alone.
        first = self._first_tags(source)
        return Job(run, before.bound(ref, frozenset({tag, *first}), access))

    def commit(self, before: State) -> Job | None:
        """A new version over what a guest holds, if the name still means that."""
        if not _mine(before):
            return None
        ref, tag = self._dice.choice(_mine(before)), _tag()
        kind = Store(self._root).resolve(Reference.parse(ref)).kind

        def run() -> None:
            store = Store(self._root)
            old = store.resolve(Reference.parse(ref))
            with store.hold([old.digest], f"committer-{os.getpid()}"), store.workspace() as work:
                layers = [_layer(work / "image", tag, 0)]
                parsed = Reference.parse(ref)
                store.verify(store.put(kind, parsed, b"{}", layers, replace=old.digest))

        return Job(run, before.bound(ref, frozenset({tag}), {}))

    def build(self, before: State) -> Job:
        """`onecopy build`"""
        ref, tag, access = self._target()
        folder = self._outside / "tree"
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text(tag * 20)
        argv = ["build", ref, "--from", f"dir:{folder}", *_domain(access)]
        return Job(lambda: _onecopy(*argv), before.bound(ref, frozenset({tag}), access))

    def create(self, before: State) -> Job:
        """`onecopy create`"""
        ref, tag, access = self._target()
        file = self._outside / "range"
        file.write_text(tag * 20)
        argv = ["create", ref, "--range", f"SC:2M:{file}", "--range", "SW:2M", *_domain(access)]
        return Job(lambda: _onecopy(*argv), before.bound(ref, frozenset({tag}), access))

    def write(self, before: State) -> Job | None:
        """The live content of an SC range is made."""
        segments = [
            artifact
            for artifact in Store(self._root).artifacts("segment")
            if b'"SC"' in artifact.config
        ]
        if not segments:
            return None
        segment = self._dice.choice(segments)

        def run() -> None:
            Store(self._root).live(segment.layers[0], segment.digest, 0, 2 << 20)

        return Job(run, before)

    def tag(self, before: State) -> Job | None:
        """`onecopy tag`, half of the time into another trust domain"""
        if not _mine(before):
            return None
        source = self._dice.choice(_mine(before))
        kept = before.access.get(source.partition(":")[0], {})
        free = [name for name in ("copy", "shop") if not before.knows(name)]
        if not free:
            return self.rm(before, among=("copy", "shop"))
        name = self._dice.choice(free)
        target, argv = f"{name}:1", ["tag", source, f"{name}:1"]
        if name == "shop":
            argv += ["--domain", "shop"]
            kept = {"domain": "shop", **{k: v for k, v in kept.items() if k == "restricted"}}
        after = before.bound(target, before.refs[source][0], kept)
        return Job(lambda: _onecopy(*argv), after)

    def rm(self, before: State, among: tuple[str, ...] = ()) -> Job | None:
        """`onecopy rm --pending`"""
        refs = [r for r in _mine(before) if not among or r.partition(":")[0] in among]
        if not refs:
            return None
        ref = self._dice.choice(refs)
        return Job(lambda: _onecopy("rm", "--pending", ref), before.dropped(ref))

    def grant(self, before: State) -> Job | None:
        """`onecopy grant`, and `revoke --unrestrict` if it is restricted"""
        names = sorted({ref.partition(":")[0] for ref in _mine(before)})
        if not names:
            return None
        name = self._dice.choice(names)
        old = before.access.get(name, {})
        domain = {k: v for k, v in old.items() if k == "domain"}
        if old.get("restricted"):
            argv, new = ["revoke", name, "--unrestrict"], domain
        else:
            new = {**domain, "restricted": True, "grants": ["web-*"]}
            argv = ["grant", name, "web-*"]
        return Job(lambda: _onecopy(*argv), before.granted(name, new))

    def hold(self, before: State) -> Job | None:
        """A guest's leases, and a link for what it loads."""
        found = Store(self._root).artifacts()
        if not found:
            return None
        one, other = self._dice.choice(found), self._dice.choice(found)

        def run() -> None:
            store = Store(self._root)
            with store.hold([one.digest], "starting") as main:
                with store.extend("starting", [other.digest]):
                    (main.files / "blob").hardlink_to(other.layers[0].path)
                store.sweep()

        return Job(run, before)

    def _target(self) -> tuple[str, str, dict[str, Any]]:
        name = self._dice.choice(NAMES)
        access = {"domain": "lab"} if name == "lab" else {}
        return f"{name}:{self._dice.choice(VERSIONS)}", _tag(), access

    def _first_tags(self, ref: str) -> list[str]:
        path = Store(self._root).resolve(Reference.parse(ref)).layers[0].path
        text = path.read_bytes()
        at = text.find(b"TAG-")
        return [text[at : at + 12].decode()] if at >= 0 else []


KINDS = ("put", "pull", "commit", "build", "create", "write", "tag", "rm", "grant", "hold")


def _mine(before: State) -> list[str]:
    """All names but the one that a bystander changes at the same time."""
    return sorted(ref for ref in before.refs if ref != BESIDE)


def _tag() -> str:
    return f"TAG-{next(_numbers):08d}"


def _layer(path: Path, tag: str, number: int, size: int = _RAM) -> NewLayer:
    path.write_bytes((f"{number} {tag} ".encode() * (size // 10))[:size])
    return NewLayer(path, _PMEM, {"org.onecopy.role": f"part{number}"}, size=size)


def _domain(access: dict[str, Any]) -> list[str]:
    return ["--domain", access["domain"]] if access else []


def _onecopy(*argv: str) -> None:
    code = cli.main(list(argv))
    assert code == 0, f"onecopy {' '.join(argv)}: exit code {code}"
