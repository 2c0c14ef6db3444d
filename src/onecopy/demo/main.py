"""The steps of the demo: build, save, boot guests, start clones, and compare them."""

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
BOOTED_GUESTS = 2
CLONES = 8


def specification(accel: Choice) -> BootSpec:
    """Return the demo's guest: Debian with Python, and an HTTP service in a second segment."""
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
    """Run the demo. Its segments and saved system stay in the store; its guests are ended.

    Args:
        host: The runtime of the guests.
        accel: The accelerator to use.
        tell: Called with one line of text for each step.

    Returns:
        The accelerator with its reason, and the figures of booted guests and of clones.

    Raises:
        OnecopyError: Any error of building, saving and starting.
    """
    build_all(host, tell)
    spec = specification(accel)
    tell("saving a system with a running HTTP service")
    system = (await save.save_system(host, SYSTEM, spec, tell)).artifact
    tell(f"booting {BOOTED_GUESTS} guests")
    booting = replace(spec, ready="true", publish=((0, 80),))
    booted = await _batch(host, "booted", BOOTED_GUESTS, booting)
    tell(f"starting {CLONES} clones of the saved system")
    cloning = CloneSpec(system=Reference.parse(system.ref), publish=((0, 80),))
    cloned = await _batch(host, "cloned", CLONES, cloning)
    return booted.accel, [booted, cloned]


def build_all(host: Runtime, tell: Callable[[str], None]) -> None:
    """Build the application's segment, and the root segment if the store lacks it."""
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
