"""What all measured guests are made of: one root image, one kernel, one application.

Not here: starting guests (plain.py for those that onecopy has no hand in, kinds.py).
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from msgspec.structs import replace

from onecopy.guest.lifecycle.launchplan import Boot, BootSpec, CloneSpec, LaunchPlan
from onecopy.guest.lifecycle.save import save_system
from onecopy.guest.lifecycle.start import plan_launch
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.model import Reference
from onecopy.store import Artifact
from onecopy.vmm.accel import Choice

#: Kept in the store for the next run.
ROOT = Reference("bench-root")
#: Removed at the end.
SYSTEM = Reference("bench")
ALONE = Reference("bench-alone")
_SOURCE, _PACKAGES = "debian:bookworm", ("python3",)
#: A shell command: the application answers (asked in the guest, of itself).
READY = "python3 -c 'import urllib.request; urllib.request.urlopen(\"http://127.0.0.1\")'"


@dataclass(frozen=True, slots=True)
class Setup:
    """Ready to be started, in any number and by any way."""

    host: Runtime
    spec: BootSpec
    prepared: LaunchPlan
    """A guest that executes the root image in place and runs the application."""
    saved: LaunchPlan
    """The same guest, saved when the application answered."""
    work: Path
    """A scratch folder."""
    save_seconds: float

    @property
    def kernel(self) -> Artifact:
        """The kernel that guests boot, with its modules."""
        return _boot(self).kernel

    @property
    def tools(self) -> Artifact | None:
        """What onecopy has in each guest."""
        return _boot(self).tools

    @property
    def image(self) -> Path:
        """The root image."""
        return self.prepared.source.layer("image").path


def _boot(setup: Setup) -> Boot:
    assert setup.prepared.boot  # noqa: S101 - for the type checker: it boots
    return setup.prepared.boot


def resource(name: str) -> str:
    """A file of this folder."""
    return resources.files("benchmarks").joinpath(name).read_text()


def application() -> str:
    """The shell command that runs the application in a guest."""
    return f"exec python3 -c {shlex.quote(resource('app.py'))}"


async def set_up(
    host: Runtime,
    work: Path,
    accel: Choice,
    tell: Callable[[str], None],
    root: Reference | None = None,
) -> Setup:
    """Save the system, on ``root`` or on one that is built if the store lacks it."""
    if root is None and host.store.find(ROOT, "segment") is None:
        build_segment(host.store, ROOT, _SOURCE, BuildOptions(include=_PACKAGES), progress=tell)
    spec = BootSpec(root=root or ROOT, command=application(), ready=READY, accel=accel)
    prepared = plan_launch(host, spec, tell)
    began = time.monotonic()
    artifact = (await save_system(host, SYSTEM, spec, tell)).artifact
    return Setup(
        host=host,
        spec=spec,
        prepared=prepared,
        saved=plan_clones(host, artifact),
        work=work,
        save_seconds=time.monotonic() - began,
    )


async def without_network(setup: Setup, tell: Callable[[str], None]) -> LaunchPlan:
    """The same guest, saved without a network card."""
    spec = replace(setup.spec, network=False)
    return plan_clones(setup.host, (await save_system(setup.host, ALONE, spec, tell)).artifact)


def plan_clones(host: Runtime, system: Artifact) -> LaunchPlan:
    """The plan of clones of a saved system."""
    return plan_launch(host, CloneSpec(system=Reference.parse(system.ref)))
