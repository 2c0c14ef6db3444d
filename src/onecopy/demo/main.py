"""The demo's course: build, save, start cold and saved guests, and compare them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from msgspec.structs import replace

from onecopy.demo.measure import Measured, start_batch
from onecopy.guest.lifecycle import save, start
from onecopy.guest.lifecycle.launchplan import BootSpec, CloneSpec
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.images.deb_packages import host_suite
from onecopy.model import Reference
from onecopy.vmm.accel import Choice

ROOT = Reference("demo-root")
APP = Reference("demo-app")
SYSTEM = Reference("demo-hello")
COLD_GUESTS = 2
SAVED_GUESTS = 8


def specification(accel: Choice) -> BootSpec:
    """The guest of the demo: Debian with Python, and an HTTP service from a segment of its own."""
    return BootSpec(
        root=ROOT,
        segments=((APP, "/srv"),),
        command="python3 /srv/hello.py",
        ready="wget -q -O /dev/null http://127.0.0.1:80/",
        accel=accel,
    )


async def run(
    host: Runtime, accel: Choice, tell: Callable[[str], None]
) -> tuple[str, list[Measured]]:
    """Do it all; returns the accelerator (and why) and what both kinds of guests took.

    The demo's segments and system stay in the store, its guests do not stay.
    """
    build_all(host, tell)
    spec = specification(accel)
    tell("saving a system whose HTTP service is up")
    system = (await save.save_system(host, SYSTEM, spec, tell)).artifact
    tell(f"starting {COLD_GUESTS} guests cold")
    booting = replace(spec, ready="true", publish=((0, 80),))
    cold = await _batch(host, "cold", COLD_GUESTS, booting)
    tell(f"starting {SAVED_GUESTS} guests from the saved system")
    cloning = CloneSpec(system=Reference.parse(system.ref), publish=((0, 80),))
    saved = await _batch(host, "saved", SAVED_GUESTS, cloning)
    return cold.accel, [cold, saved]


def build_all(host: Runtime, tell: Callable[[str], None]) -> None:
    """The root segment, once, and the application's, which is quick."""
    if not host.store.find(ROOT, "segment"):
        options = BuildOptions(include=("python3",))
        build_segment(host.store, ROOT, f"debian:{host_suite()}", options, progress=tell)
    with resources.as_file(resources.files("onecopy.demo").joinpath("app")) as folder:
        build_segment(host.store, APP, f"dir:{Path(folder)}", progress=tell)


async def _batch(host: Runtime, kind: str, count: int, spec: BootSpec | CloneSpec) -> Measured:
    name = f"demo-{kind}-{secrets.token_hex(2)}"
    with host.owner() as owner:
        # The demo is to run on small hosts, too.
        request = start.Request(spec, count, name, overcommit=True)
        return await start_batch(host, kind, request, owner)
