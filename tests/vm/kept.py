"""Keeps stores with slow content from one test run to the next.

They lie in ``$ONECOPY_TEST_CACHE`` (default: .cache/onecopy-tests). One store holds kernel, tools
and Debian roots, and is rebuilt when src/onecopy/images changes. The other holds saved systems that
several sessions start from, and is rebuilt when anything in src/onecopy changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.images.deb_packages import fetch_package
from onecopy.images.kernel import ensure_kernel
from onecopy.images.tools import ensure_tools
from onecopy.model import Reference
from onecopy.store import Artifact, NewLayer, Store
from onecopy.subprocesses import run
from onecopy.vmm.accel import Choice, choose

PROJECT = Path(__file__).parents[2]
#: The suite of the guests' roots.
SUITE = os.environ.get("ONECOPY_TEST_SUITE", "bookworm")
#: Suite -> Python, its own tests, the names of services that these ask for, and a key that is made
#: at its installation.
TEST_PACKAGES = {
    "bookworm": ("python3", "libpython3.11-testsuite", "netbase", "ssl-cert"),
    "trixie": ("python3", "libpython3.13-testsuite", "netbase", "ssl-cert"),
}
#: Debian 13 as people run it.
SERVICES = Reference("services", "trixie")
SERVICES_PACKAGES = ("systemd-sysv", "dbus", "openssh-server", "cron")
#: A system that is no Linux: the kernel by itself of that package.
MEMTEST = Reference("memtest")
MEMTEST_PACKAGE = "memtest86+"


@contextlib.contextmanager
def _only(name: str, digest: str) -> Iterator[Path]:
    """The kept store of a name and digest, locked; others of the name are removed."""
    cache = Path(os.environ.get("ONECOPY_TEST_CACHE", PROJECT / ".cache/onecopy-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = cache / f"{name}-{digest}"
        for other in cache.glob(f"{name}-*"):
            if other != path:
                shutil.rmtree(other)
        yield path


@contextlib.contextmanager
def kept_store(roots: Sequence[str] = (SUITE,), host: str = "") -> Iterator[Runtime]:
    """The kept store, locked meanwhile: filled for guests of the suites ``roots``.

    Kernel and tools are those of the suite ``host`` (default: this host's). Raises BadSource and
    MissingProgram if it cannot be filled here.
    """
    with _only("store", builders_digest()) as path:
        kept = Runtime.open(path)
        kernel = ensure_kernel(kept.store, suite=host)
        ensure_tools(kept.store, suite=host)
        wanted: dict[Reference, tuple[str, ...]] = {SERVICES: SERVICES_PACKAGES}
        for suite in roots:
            wanted |= {Reference(name, suite): each for name, each in _roots(suite).items()}
        # Mirrors and disks are waited for.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda item: _ensure_root(kept, *item), wanted.items()))
        _ensure_memtest(kept)
        # The answers of QEMU and of the KVM probe are kept beside the store, too.
        choose(Choice.AUTO, kept.qemu.binary, kernel.layer("kernel").path, kept.store.cache)
        yield kept


def _roots(suite: str) -> dict[str, tuple[str, ...]]:
    """Name of a kept segment -> the Debian packages in it; its version is the suite."""
    return {"python": TEST_PACKAGES[suite], "systemd": ("systemd-sysv", "dbus")}


def _ensure_root(kept: Runtime, ref: Reference, packages: tuple[str, ...]) -> None:
    if not kept.store.find(ref, "segment"):
        build_segment(kept.store, ref, f"debian:{ref.version}", BuildOptions(include=packages))


def _ensure_memtest(kept: Runtime) -> None:
    if not kept.store.find(MEMTEST, "kernel"):
        with kept.store.workspace() as work:
            package = fetch_package((MEMTEST_PACKAGE,), "trixie", work, lambda _: None)
            run(["dpkg-deb", "--extract", package, work / "tree"])
            image = next((work / "tree/boot").glob("m*x64.bin"))
            build_segment(kept.store, MEMTEST, f"kernel:{image}")


def kept_system(host: Runtime, name: str, make: Callable[[], Artifact]) -> Artifact:
    """The saved system ``name`` in the host's store: a kept one, or what ``make`` saves.

    What it boots from must be in the store. Sessions that run beside each other save it once.
    """
    kernel = ensure_kernel(host.store).layer("kernel").path
    accel = choose(Choice.AUTO, host.qemu.binary, kernel, host.store.cache)
    here = f"{accel.name} {host.qemu.version}"
    # What the system is made of is said by the fixtures, too.
    fixtures = sorted(Path(__file__).parent.glob("[!t]*.py"))
    with _only("systems", _digest(here, [*_sources("."), *fixtures])) as path:
        kept = Store(path)
        found = kept.find(Reference(name), "system")
        if found:
            return copy_artifact(found, host.store)
        made = make()
        copy_artifact(made, kept)
        return made


def copy_artifact(artifact: Artifact, into: Store) -> Artifact:
    """Store a copy of an artifact, under its own name, in another store."""
    with into.workspace() as work:
        layers = []
        for layer in artifact.layers:
            file = work / layer.digest
            run(["cp", layer.path, file])
            layers.append(NewLayer(file, layer.media_type, layer.annotations))
        ref = Reference.parse(artifact.ref)
        return into.put_own(artifact.kind, ref, artifact.config, layers)


def builders_digest() -> str:
    """Changes with all that builds segments, and with what is in those that are kept."""
    roots = {suite: _roots(suite) for suite in TEST_PACKAGES}
    return _digest(repr((roots, SERVICES_PACKAGES)), _sources("images"))


def _sources(part: str) -> list[Path]:
    files = (PROJECT / "src/onecopy" / part).rglob("*")
    return sorted(p for p in files if p.is_file() and p.suffix != ".pyc")


def _digest(text: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(text.encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
