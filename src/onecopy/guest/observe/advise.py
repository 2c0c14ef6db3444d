"""From guests, others' included, and files to advice, and to the commands that carry it out.

Not here: what is compared and how (sharing/survey.py, sharing/ram_scan.py, sharing/advice.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from onecopy.errors import InvalidInput, NotFound
from onecopy.guest.observe.accounts import guest_maps, vmm_maps
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.linux.files import Identity, open_regular
from onecopy.model import Reference
from onecopy.sharing.account import GuestMaps
from onecopy.sharing.advice import Advice
from onecopy.sharing.file_pages import Image
from onecopy.sharing.survey import LeftOut, Sources, Survey, survey
from onecopy.store import Access, Artifact
from onecopy.vmm import external_qemu
from onecopy.vmm.external_qemu import Vmm

Tell = Callable[[str], None]

#: What stands in a step where the user knows better.
_WHERE = "/MOUNTPOINT"
#: Bytes of others' disks that are read: they can name what takes hours.
_MOST_OF_DISKS = 256 << 30


class Step(msgspec.Struct, frozen=True):
    """One command that carries the advice out."""

    argv: tuple[str, ...]
    why: str
    ref: str = ""
    """The segment that it builds; empty if it builds none."""
    source: str = ""
    """From what, as `onecopy build --from` has it."""


class Advised(msgspec.Struct, frozen=True):
    """What was found, and what to do."""

    survey: Survey
    steps: tuple[Step, ...]
    domain: str = ""
    """The trust domain of the guests; "" is the default one."""
    disks: Mapping[str, Identity] = {}
    """Which files others' disks were, by what steps call them."""

    def to_json(self) -> dict[str, object]:
        """As JSON values, all on one level (docs/json.md)."""
        survey: dict[str, object] = msgspec.to_builtins(self.survey)
        advice: dict[str, object] = msgspec.to_builtins(self.survey.advice)
        del survey["advice"]
        return advice | survey | {"steps": msgspec.to_builtins(self.steps)}


def look(
    host: Runtime,
    names: Sequence[str] = (),
    *,
    roots: Sequence[Path] = (),
    files: Sequence[Path] = (),
    name: str = "shared",
    tell: Tell = lambda _: None,
) -> Advised:
    """Look at the guests of these ``names``, or at all, those of others included.

    ``roots`` are images and folders that guests' root file systems are made from, beside the disks
    that others' QEMUs name; ``files`` are folders that a further segment could have, beside the
    segments that are stored. ``name`` is what the steps call the new segment. Guests of a trust
    domain are compared among themselves, when they are named. Raises NotFound, InvalidInput.
    """
    chosen = _choose(host, names)
    mine = [Image(str(path), path) for path in roots if not _is_folder(path)]
    sources = Sources(
        root_images=[*chosen.disks, *mine],
        root_trees=[path for path in roots if _is_folder(path)],
        images=_segments(host, chosen.domain),
        trees=files,
    )
    found = survey(chosen.guests, sources, tell)
    found = replace(found, left_out=(*found.left_out, *chosen.left_out))
    roots_of = [f"{'dir' if _is_folder(path) else 'disk'}:{path}" for path in roots]
    # What stands behind # is a partition's number: such a name would be that of another file.
    roots_of += [f"disk:{disk.path}" for disk in chosen.disks if "#" not in str(disk.path)]
    steps = _steps(found.advice, name, chosen.ours, roots_of, files)
    which = {f"disk:{disk.path}": disk.same_as for disk in chosen.disks if disk.same_as}
    return Advised(found, tuple(steps), chosen.domain, which)


def apply(host: Runtime, advised: Advised, tell: Tell = lambda _: None) -> list[Artifact]:
    """Build the segments of the steps, in the guests' trust domain.

    Raises as `build_segment`, and NotFound if another file has the name of a disk by now.
    """
    access = Access(domain=advised.domain)
    for step in advised.steps:
        if step.source in advised.disks:
            path = Path(step.source.removeprefix("disk:"))
            os.close(open_regular(path, advised.disks[step.source]))
    return [
        build_segment(
            host.store, Reference.parse(step.ref), step.source, access=access, progress=tell
        )
        for step in advised.steps
        if step.ref
    ]


class _Chosen(msgspec.Struct, frozen=True):
    """The guests to look at, of one trust domain."""

    guests: Sequence[GuestMaps]
    left_out: Sequence[LeftOut]
    ours: frozenset[str]
    """Which of them can be saved."""
    disks: Sequence[Image]
    """Of the others, each once."""
    domain: str


def _choose(host: Runtime, names: Sequence[str]) -> _Chosen:
    records = host.guests()
    ours = guest_maps(records)
    found = external_qemu.find({each.pid for each in [*ours, *guest_maps(host.prepared())]})
    theirs = [vmm_maps(vmm) for vmm in found.vmms]
    every = [*ours, *theirs]
    if unknown := set(names) - {each.name for each in every}:
        raise NotFound(
            f"no guest {', '.join(sorted(unknown))}",
            hint="`onecopy report` lists all, also those of other programs",
        )
    domains = {each.pid: each.domain for each in records}
    # Anybody can call a process as a guest of ours is called.
    known = {each.name for each in ours}
    wanted = [*ours, *(each for each in theirs if each.name not in known)] if names else every
    wanted = [each for each in wanted if not names or each.name in names]
    domain = _domain({domains.get(each.pid, "") for each in wanted} if names else {""})
    guests = [each for each in wanted if domains.get(each.pid, "") == domain]
    pids = {each.pid for each in guests}
    disks, large = _disks([vmm for vmm in found.vmms if vmm.pid in pids])
    left_out = [_of_domain(each) for each in wanted if each.pid not in pids]
    unseen = () if names else (LeftOut("?", 0, each) for each in found.left_out)
    return _Chosen(
        guests=guests,
        left_out=[*left_out, *large, *unseen],
        ours=frozenset(known),
        disks=disks,
        domain=domain,
    )


def _disks(vmms: Sequence[Vmm]) -> tuple[list[Image], list[LeftOut]]:
    """Their disks, each once, and those that are too much to read."""
    images, left_out, room = dict[str, Image](), [], _MOST_OF_DISKS
    for vmm in vmms:
        for path in vmm.disks:
            with suppress(OSError):
                size = Path(path).stat().st_blocks * 512
                if size > room:
                    reason = f"its disk {path} was not read: there are too many and large ones"
                    left_out.append(LeftOut(vmm.name, vmm.pid, reason))
                elif path not in images:
                    images[path] = Image(path, Path(path), vmm.regular[path])
                    room -= size
    return list(images.values()), left_out


def _is_folder(path: Path) -> bool:
    if not path.exists():
        raise NotFound(f"there is no {path}", hint="name an image or a folder")
    return path.is_dir()


def _domain(domains: set[str]) -> str:
    if len(domains) > 1:
        raise InvalidInput(
            "guests of several trust domains share nothing", hint="name guests of one of them"
        )
    return domains.pop() if domains else ""


def _of_domain(guest: GuestMaps) -> LeftOut:
    return LeftOut(guest.name, guest.pid, "it is of a trust domain; name the guests of that one")


def _segments(host: Runtime, domain: str) -> list[Image]:
    # By path: a segment may have several names, and is read once.
    names = {
        layer.path: each.ref
        for each in host.store.artifacts("segment")
        if host.store.access(each.name).domain == domain
        for layer in each.layers
    }
    return [Image(name, path) for path, name in names.items()]


def _steps(
    advice: Advice, name: str, ours: Container[str], roots: Sequence[str], files: Sequence[Path]
) -> list[Step]:
    steps = []
    build = _build(name, roots[0] if roots else "", "the root file system, once")
    from_guest = advice.best_guest if advice.best_guest in ours else None
    if "root" in advice.take or ("saved" in advice.take and not from_guest):
        steps.append(build)
    if "saved" in advice.take:
        options = ["--from", from_guest] if from_guest else ["--root", name]
        why = "a guest as it is now" if from_guest else "booted once, with your options for `save`"
        steps.append(_step("save", f"{name}-system", *options, why=why))
        steps.append(_step("run", "-n", "N", f"{name}-system", why="guests that share it"))
    elif "root" in advice.take:
        steps.append(_step("boot", name, why="guests that execute it in place"))
    if "extra" in advice.take:
        steps += _extra(advice, name, files)
    if "ksm" in advice.take:
        steps.append(_step("ksm", "on", why="merges what is left"))
    return steps


def _extra(advice: Advice, name: str, files: Sequence[Path]) -> list[Step]:
    """The folder, or the stored segment, in which most was found."""
    for found in advice.files:
        for folder in files:
            if Path(found.name).is_relative_to(folder):
                new = f"{name}-files"
                load = _step("attach", "GUEST", f"{new}:{_WHERE}", why="before they are read")
                return [_build(new, f"dir:{folder}", "these files, once"), load]
        if not found.name.startswith("/"):
            what = f"{found.name}:{_WHERE}"
            return [_step("attach", "GUEST", what, why="in place of the guests' own files")]
    raise InvalidInput("no file was found that a segment could have", hint="report this as a bug")


def _step(*argv: str, why: str) -> Step:
    return Step(("onecopy", *argv), why)


def _build(name: str, source: str, why: str) -> Step:
    """Without a ``source`` it is for the user to say, and `apply` does not build it."""
    argv = ("onecopy", "build", name, "--from", source or "SOURCE")
    return Step(argv, why, name if source else "", source)
