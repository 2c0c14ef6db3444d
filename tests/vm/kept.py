"""A store with what takes long to make, kept from one test run to the next.

It lies in ``$ONECOPY_TEST_CACHE`` (default: .cache/onecopy-tests) and holds kernel, tools and
Debian roots. It is made anew when src/onecopy/images changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.images.deb_packages import fetch_package
from onecopy.images.kernel import ensure_kernel
from onecopy.images.tools import ensure_tools
from onecopy.model import Reference
from onecopy.subprocesses import run
from onecopy.vmm.accel import Choice, choose

PROJECT = Path(__file__).parents[2]
#: The suite of the guests' roots.
SUITE = os.environ.get("ONECOPY_TEST_SUITE", "bookworm")
#: Suite -> Python, its own tests, and the names of services that these ask for.
TEST_PACKAGES = {
    "bookworm": ("python3", "libpython3.11-testsuite", "netbase"),
    "trixie": ("python3", "libpython3.13-testsuite", "netbase"),
}
#: Debian 13 as people run it.
SERVICES = Reference("services", "trixie")
SERVICES_PACKAGES = ("systemd-sysv", "dbus", "openssh-server", "cron")
#: A system that is no Linux: the kernel by itself of that package.
MEMTEST = Reference("memtest")
MEMTEST_PACKAGE = "memtest86+"


@contextlib.contextmanager
def kept_store(roots: Sequence[str] = (SUITE,), host: str = "") -> Iterator[Runtime]:
    """The kept store, locked meanwhile: filled for guests of the suites ``roots``.

    Kernel and tools are those of the suite ``host`` (default: this host's). Raises BadSource and
    MissingProgram if it cannot be filled here.
    """
    cache = Path(os.environ.get("ONECOPY_TEST_CACHE", PROJECT / ".cache/onecopy-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = cache / f"store-{builders_digest()}"
        for other in cache.glob("store-*"):
            if other != path:
                shutil.rmtree(other)
        kept = Runtime.open(path)
        kernel = ensure_kernel(kept.store, suite=host)
        ensure_tools(kept.store, suite=host)
        for suite in roots:
            _ensure_roots(kept, suite)
        _ensure_services(kept, SERVICES, SERVICES_PACKAGES)
        _ensure_memtest(kept)
        # The answers of QEMU and of the KVM probe are kept beside the store, too.
        choose(Choice.AUTO, kept.qemu.binary, kernel.layer("kernel").path, kept.store.cache)
        yield kept


def _roots(suite: str) -> dict[str, tuple[str, ...]]:
    """Name of a kept segment -> the Debian packages in it; its version is the suite."""
    return {"python": TEST_PACKAGES[suite], "systemd": ("systemd-sysv", "dbus")}


def _ensure_roots(kept: Runtime, suite: str) -> None:
    for name, packages in _roots(suite).items():
        ref = Reference(name, suite)
        if not kept.store.find(ref, "segment"):
            build_segment(kept.store, ref, f"debian:{suite}", include=packages)


def _ensure_services(kept: Runtime, ref: Reference, packages: Sequence[str]) -> None:
    if not kept.store.find(ref, "segment"):
        build_segment(kept.store, ref, f"debian:{ref.version}", include=packages)


def _ensure_memtest(kept: Runtime) -> None:
    if not kept.store.find(MEMTEST, "kernel"):
        with kept.store.workspace() as work:
            package = fetch_package((MEMTEST_PACKAGE,), "trixie", work, lambda _: None)
            run(["dpkg-deb", "--extract", package, work / "tree"])
            image = next((work / "tree/boot").glob("m*x64.bin"))
            build_segment(kept.store, MEMTEST, f"kernel:{image}")


def builders_digest() -> str:
    """Changes with all that builds segments, and with what is in those that are kept."""
    roots = {suite: _roots(suite) for suite in TEST_PACKAGES}
    digest = hashlib.sha256(repr((roots, SERVICES_PACKAGES)).encode())
    files = (PROJECT / "src/onecopy/images").rglob("*")
    for path in sorted(p for p in files if p.is_file() and p.suffix != ".pyc"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
