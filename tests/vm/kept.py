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
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
PYTHON_ROOT, SYSTEMD_ROOT = Reference("python", SUITE), Reference("systemd", SUITE)
#: Debian 13 as people run it.
SERVICES = Reference("services", "trixie")
#: A root -> the packages in it, of the suite that is its version.
ROOTS: dict[Reference, tuple[str, ...]] = {
    **{Reference("python", suite): packages for suite, packages in TEST_PACKAGES.items()},
    **{Reference("systemd", suite): ("systemd-sysv", "dbus") for suite in TEST_PACKAGES},
    SERVICES: ("systemd-sysv", "dbus", "openssh-server", "cron"),
}
#: A system that is no Linux: the kernel by itself of that package.
MEMTEST = Reference("memtest")
MEMTEST_PACKAGE = "memtest86+"


class Kept(NamedTuple):
    """The kept store, and what was asked for: kernels, tools, the bare machine, roots."""

    host: Runtime
    artifacts: list[Artifact]

    def copy(self, into: Path) -> None:
        """Make a store with copies of the artifacts, and with what is known of this host.

        Copied, not linked: a test may damage what it has.
        """
        store = Store(into)
        for artifact in self.artifacts:
            copy_artifact(artifact, store)
        # The answers of QEMU and of the KVM probe are kept beside the store.
        shutil.copytree(self.host.store.cache, store.cache, dirs_exist_ok=True)


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
def kept_store(roots: Sequence[Reference] = (), hosts: Sequence[str] = ("",)) -> Iterator[Kept]:
    """The kept store, locked meanwhile: with kernels, tools, the bare machine and ``roots``.

    Kernels and tools are those of the suites ``hosts`` (default: this host's). Raises BadSource and
    MissingProgram if it cannot be filled here.
    """
    with _only("store", builders_digest()) as path:
        kept = Runtime.open(path)
        wanted: list[Callable[[], Artifact]] = [
            *(partial(ensure_kernel, kept.store, suite=host) for host in hosts),
            *(partial(ensure_tools, kept.store, suite=host) for host in hosts),
            partial(_ensure_memtest, kept.store),
            *(partial(_ensure_root, kept.store, root) for root in roots),
        ]
        # Mirrors and disks are waited for.
        with ThreadPoolExecutor(2) as pool:
            artifacts = list(pool.map(lambda make: make(), wanted))
        kernel = artifacts[0].layer("kernel").path
        choose(Choice.AUTO, kept.qemu.binary, kernel, kept.store.cache)
        yield Kept(kept, artifacts)


def kept_root(host: Runtime, ref: Reference) -> Artifact:
    """The root ``ref`` in the host's store: a copy of the kept one. Raises as `kept_store`."""
    found = host.store.find(ref, "segment")
    if found:
        return found
    with kept_store((ref,)) as kept:
        return copy_artifact(kept.artifacts[-1], host.store)


def _ensure_root(store: Store, ref: Reference) -> Artifact:
    found = store.find(ref, "segment")
    return found or build_segment(
        store, ref, f"debian:{ref.version}", BuildOptions(include=ROOTS[ref])
    )


def _ensure_memtest(store: Store) -> Artifact:
    found = store.find(MEMTEST, "kernel")
    if found:
        return found
    with store.workspace() as work:
        package = fetch_package((MEMTEST_PACKAGE,), "trixie", work, lambda _: None)
        run(["dpkg-deb", "--extract", package, work / "tree"])
        image = next((work / "tree/boot").glob("m*x64.bin"))
        return build_segment(store, MEMTEST, f"kernel:{image}")


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
    """Store a copy of an artifact, under its own name, in another store.

    Its blobs have their digests already: hashing them takes minutes in an emulated host.
    """
    with into.workspace() as work:
        for layer in artifact.layers:
            blob = into.root / "blobs/sha256" / layer.path.name
            if not blob.exists():
                run(["cp", "--archive", "--reflink=auto", layer.path, work / blob.name])
                (work / blob.name).rename(blob)
    layers = [NewLayer.of(layer) for layer in artifact.layers]
    return into.put_own(artifact.kind, Reference.parse(artifact.ref), artifact.config, layers)


def builders_digest() -> str:
    """Changes with all that builds segments, and with what is in those that are kept."""
    return _digest(repr(ROOTS), _sources("images"))


def _sources(part: str) -> list[Path]:
    files = (PROJECT / "src/onecopy" / part).rglob("*")
    return sorted(p for p in files if p.is_file() and p.suffix != ".pyc")


def _digest(text: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(text.encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
