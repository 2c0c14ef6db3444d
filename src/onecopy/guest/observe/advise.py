"""Surveys guests and files for equal pages, and turns the advice into commands.

Other programs' QEMU processes are included. Not here: the comparison (sharing/survey.py,
sharing/ram_scan.py) and the advice (sharing/advice.py).
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
from onecopy.model import Reference, format_size
from onecopy.sharing.account import GuestMaps
from onecopy.sharing.advice import Advice
from onecopy.sharing.file_pages import Image
from onecopy.sharing.survey import LeftOut, Sources, Survey, survey
from onecopy.store import Access, Artifact
from onecopy.vmm import external_qemu
from onecopy.vmm.external_qemu import Vmm

Tell = Callable[[str], None]

#: Placeholder for a mount point that the user chooses.
_WHERE = "/MOUNTPOINT"
#: The most bytes of other QEMU processes' disks to read. They can be too large to read.
_MAX_DISK_BYTES = 256 << 30


class Step(msgspec.Struct, frozen=True):
    """A command that carries out the advice."""

    argv: tuple[str, ...]
    why: str
    ref: str = ""
    """The segment that it builds; "" for none."""
    source: str = ""
    """The source of that segment, as for `onecopy build --from`."""


class Advised(msgspec.Struct, frozen=True):
    """A survey and the steps that it suggests."""

    survey: Survey
    steps: tuple[Step, ...]
    domain: str = ""
    """The trust domain of the guests; "" is the default one."""
    disks: Mapping[str, Identity] = {}
    """Source of a step -> identity of the disk's file when it was surveyed."""

    def to_json(self) -> dict[str, object]:
        """Convert to JSON values, all on one level (docs/json.md)."""
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
    """Survey guests for pages that they could share.

    Guests of a trust domain are compared with each other only, and only if they are named.

    Args:
        host: The runtime of the guests.
        names: The guests; default: all, with those of other programs.
        roots: Images and directories of the guests' root file systems, in addition to the disks of
            other QEMU processes.
        files: Directories that a new segment could hold, in addition to stored segments.
        name: The name of the new segment in the steps.
        tell: Called with one line of text for each step.

    Raises:
        NotFound: There is no such guest or path.
        InvalidInput: The named guests belong to several trust domains.
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
    # In a source, "#" separates a partition's number. A path with "#" would name another file.
    roots_of += [f"disk:{disk.path}" for disk in chosen.disks if "#" not in str(disk.path)]
    steps = _steps(found.advice, name, chosen.ours, roots_of, files)
    which = {f"disk:{disk.path}": disk.same_as for disk in chosen.disks if disk.same_as}
    return Advised(found, tuple(steps), chosen.domain, which)


def apply(host: Runtime, advised: Advised, tell: Tell = lambda _: None) -> list[Artifact]:
    """Build the segments of the steps, in the guests' trust domain.

    Raises:
        NotFound: The file of a disk was replaced since the survey.
        OnecopyError: Any error of `build_segment`.
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
    """The guests to survey, of one trust domain."""

    guests: Sequence[GuestMaps]
    left_out: Sequence[LeftOut]
    ours: frozenset[str]
    """Names of onecopy's guests, which can be saved."""
    disks: Sequence[Image]
    """Disks of the other guests, without duplicates."""
    domain: str


def _choose(host: Runtime, names: Sequence[str]) -> _Chosen:
    records = host.guests()
    ours = guest_maps(records)
    found = external_qemu.find({each.pid for each in [*ours, *guest_maps(host.prepared())]})
    theirs = [vmm_maps(vmm) for vmm in found.vmms]
    every = [*ours, *theirs]
    if unknown := set(names) - {each.name for each in every}:
        raise NotFound(
            f"there is no guest {', '.join(sorted(unknown))}",
            hint="list the guests, with those of other programs, with `onecopy report`",
        )
    domains = {each.pid: each.domain for each in records}
    # Another program's process may use the name of one of onecopy's guests.
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
    """Return the VMMs' disks without duplicates, and those that exceed the limit."""
    images, left_out, room = dict[str, Image](), [], _MAX_DISK_BYTES
    for vmm in vmms:
        for path in vmm.disks:
            with suppress(OSError):
                size = Path(path).stat().st_blocks * 512
                if size > room:
                    limit = format_size(_MAX_DISK_BYTES)
                    reason = f"its disk {path} was not read: all disks together exceed {limit}"
                    left_out.append(LeftOut(vmm.name, vmm.pid, reason))
                elif path not in images:
                    images[path] = Image(path, Path(path), vmm.regular[path])
                    room -= size
    return list(images.values()), left_out


def _is_folder(path: Path) -> bool:
    if not path.exists():
        raise NotFound(f"{path} does not exist", hint="give an image or a directory")
    return path.is_dir()


def _domain(domains: set[str]) -> str:
    if len(domains) > 1:
        raise InvalidInput(
            f"the guests belong to {len(domains)} trust domains, which share nothing",
            hint="name guests of one trust domain",
        )
    return domains.pop() if domains else ""


def _of_domain(guest: GuestMaps) -> LeftOut:
    reason = "it belongs to another trust domain: name the guests of that domain"
    return LeftOut(guest.name, guest.pid, reason)


def _segments(host: Runtime, domain: str) -> list[Image]:
    # Keyed by path, because a segment may have several names and is read once.
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
    build = _build(name, roots[0] if roots else "", "one copy of the root file system")
    from_guest = advice.best_guest if advice.best_guest in ours else None
    if "root" in advice.take or ("saved" in advice.take and not from_guest):
        steps.append(build)
    if "saved" in advice.take:
        options = ["--from", from_guest] if from_guest else ["--root", name]
        why = "this guest as it is now" if from_guest else "boot once, with your `save` options"
        steps.append(_step("save", f"{name}-system", *options, why=why))
        steps.append(
            _step("run", "-n", "N", f"{name}-system", why="start guests that share its memory")
        )
    elif "root" in advice.take:
        steps.append(_step("boot", name, why="boot guests that map it in place"))
    if "extra" in advice.take:
        steps += _extra(advice, name, files)
    if "ksm" in advice.take:
        steps.append(_step("ksm", "on", why="merge the other equal pages"))
    return steps


def _extra(advice: Advice, name: str, files: Sequence[Path]) -> list[Step]:
    """Return the steps for the directory or stored segment with the most equal pages."""
    for found in advice.files:
        for folder in files:
            if Path(found.name).is_relative_to(folder):
                new = f"{name}-files"
                load = _step(
                    "attach", "GUEST", f"{new}:{_WHERE}", why="before the guest reads them"
                )
                return [_build(new, f"dir:{folder}", "one copy of these files"), load]
        if not found.name.startswith("/"):
            what = f"{found.name}:{_WHERE}"
            return [_step("attach", "GUEST", what, why="replaces the guests' own files")]
    raise InvalidInput("the survey found no file for a segment", hint="report this as a bug")


def _step(*argv: str, why: str) -> Step:
    return Step(("onecopy", *argv), why)


def _build(name: str, source: str, why: str) -> Step:
    """Return a build step; without a ``source`` the user must give it, and `apply` skips it."""
    argv = ("onecopy", "build", name, "--from", source or "SOURCE")
    return Step(argv, why, name if source else "", source)
