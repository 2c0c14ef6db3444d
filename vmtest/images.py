"""Builds the segments of an emulated host; each is rebuilt only when its inputs change.

They are kept in a separate store, ``$ONECOPY_VMTEST_CACHE`` (default: .cache/onecopy-vmtest).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onecopy.errors import GuestFailed, InUse
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.model import Reference
from onecopy.store import Store
from tests.vm.kept import builders_digest, kept_store
from vmtest.root import run_in_root

PROJECT = Path(__file__).parents[1]
#: Mount points of the other segments in an emulated host.
PYTHON, TREE, STORE = "/opt/onecopy/python", "/opt/onecopy/tree", "/opt/onecopy/store"
PYCACHE = "/opt/onecopy/pycache"
#: Mount points of another release's root and Python.
OTHER_ROOT, OTHER_PYTHON = "/opt/onecopy/other/root", "/opt/onecopy/other/python"
#: Mount point -> the variable of vmtest/chroot.
_NAMES = {
    PYTHON: "PYTHON",
    TREE: "TREE",
    STORE: "STORE",
    OTHER_ROOT: "OTHER_ROOT",
    OTHER_PYTHON: "OTHER_PYTHON",
}
#: Packages beside those of script/bootstrap: Python, and packages that a minimal Debian lacks.
_PACKAGES = ("python3", "passwd", "procps", "mount", "iproute2")
#: The packages of the extra "dev" (pyproject.toml) that the tests need; the linters run elsewhere.
_TEST_PACKAGES = ("hypothesis", "pytest")
_LAUNCHER = f"#!{PYTHON}/bin/python\nfrom onecopy.__main__ import main\n\nmain()\n"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Debian:
    """A Debian release of an emulated host."""

    number: int
    suite: str
    python: str
    """Version of its python3."""


RELEASES = {
    12: Debian(12, "bookworm", "3.11"),
    13: Debian(13, "trixie", "3.13"),
}


@dataclass(frozen=True, slots=True)
class Images:
    """The segments of an emulated host."""

    root: Reference
    mounted: tuple[tuple[Reference, str], ...]
    """Pairs (segment, mount point)."""

    @property
    def named(self) -> dict[str, Reference]:
        """Return the segments by their names in vmtest/chroot."""
        return {"ROOT": self.root, **{_NAMES[at]: ref for ref, at in self.mounted if at in _NAMES}}


def store_root() -> Path:
    """Return the directory of the segments' store."""
    return Path(os.environ.get("ONECOPY_VMTEST_CACHE", PROJECT / ".cache/onecopy-vmtest"))


def ensure_images(
    host: Runtime,
    debian: Debian,
    roots: tuple[Reference, ...],
    tell: Tell,
    other: Debian | None = None,
) -> Images:
    """Build all segments for the release ``debian``, with the kept ``roots`` of guests.

    The segments of the release ``other`` are mounted, too.
    """
    builder = _Builder(host, tell)
    used = ensure_base(host, debian, tell)
    digests = (host.store.resolve(ref).digest for ref in used.named.values())
    with tempfile.TemporaryDirectory(prefix="onecopy-vmtest-") as work:
        pycache = builder.ensure_made(
            f"pycache-{debian.suite}",
            " ".join(digests),
            lambda: _compiled(Path(work) / "pycache", host.store, used, debian),
        )
    store = _store(builder, [debian, other] if other else [debian], roots)
    mounted = [*used.mounted, (pycache, PYCACHE), (store, STORE)]
    if other:
        mounted += zip(_system(builder, other), (OTHER_ROOT, OTHER_PYTHON), strict=True)
    return Images(used.root, tuple(mounted))


def ensure_base(host: Runtime, debian: Debian, tell: Tell) -> Images:
    """Build what programs of the tree need in the root of ``debian``, on any kernel."""
    builder = _Builder(host, tell)
    root, python = _system(builder, debian)
    with tempfile.TemporaryDirectory(prefix="onecopy-vmtest-") as work:
        tree = builder.ensure_made("tree", _tree_digest(), lambda: _tree(Path(work) / "tree"))
    return Images(root, ((python, PYTHON), (tree, TREE)))


def ensure_debian(
    host: Runtime, name: str, source: str, packages: tuple[str, ...], tell: Tell
) -> Reference:
    """Build the segment ``name``, a Debian root with these packages, unless it is up to date."""
    return _Builder(host, tell).ensure(name, "\n".join((source, *packages)), source, packages)


def _system(builder: _Builder, debian: Debian) -> tuple[Reference, Reference]:
    """Build the root and the Python environment of a release."""
    packages = _packages()
    root = builder.ensure(
        f"root-{debian.suite}", "\n".join(packages), f"debian:{debian.suite}", packages
    )
    with tempfile.TemporaryDirectory(prefix="onecopy-vmtest-") as work:
        python = builder.ensure_made(
            f"python-{debian.suite}",
            debian.python + _pyproject(),
            lambda: _python(Path(work) / "python", debian),
        )
    return root, python


def _store(
    builder: _Builder, releases: Sequence[Debian], roots: tuple[Reference, ...]
) -> Reference:
    """Build the segment of the store that tests copy, with kernels and tools of the releases."""
    with (
        kept_store(roots, [release.suite for release in releases]) as kept,
        builder.host.store.workspace() as work,
    ):

        def make() -> Path:
            kept.copy(work / "store")
            return work / "store"

        inputs = " ".join(artifact.digest for artifact in kept.artifacts)
        return builder.ensure_made(f"store-{releases[0].suite}", inputs, make)


@dataclass(frozen=True, slots=True)
class _Builder:
    host: Runtime
    tell: Tell

    def ensure(
        self, name: str, inputs: str, source: str, include: tuple[str, ...] = ()
    ) -> Reference:
        """Return the segment ``name`` for ``inputs``; build it, and remove its other versions."""
        return self._ensure(name, inputs, lambda: source, include)

    def ensure_made(self, name: str, inputs: str, make: Callable[[], Path]) -> Reference:
        """Return the segment ``name`` for ``inputs``; call ``make`` for its directory if needed."""
        return self._ensure(name, inputs, lambda: f"dir:{make()}")

    def _ensure(
        self, name: str, inputs: str, source: Callable[[], str], include: tuple[str, ...] = ()
    ) -> Reference:
        # The code that builds segments is an input, too.
        digest = hashlib.sha256(f"{builders_digest()}\n{inputs}".encode()).hexdigest()[:12]
        ref = Reference(name, digest)
        store = self.host.store
        if not store.find(ref, "segment"):
            for artifact in store.artifacts():
                if artifact.name == name:
                    # Another run may be using it. The next change removes it.
                    with suppress(InUse):
                        store.remove(Reference.parse(artifact.ref))
            self.tell(f"building {name}")
            build_segment(store, ref, source(), BuildOptions(include=include))
        return ref


def _packages() -> tuple[str, ...]:
    listed = _output(PROJECT / "script/bootstrap", "--packages").split()
    return tuple(sorted({*listed, *_PACKAGES}))


def _output(*argv: str | Path) -> str:
    return subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=True).stdout


def _pyproject() -> str:
    return (PROJECT / "pyproject.toml").read_text()


def _python(into: Path, debian: Debian) -> Path:
    """Install wheels into a directory as the environment of another Python version."""
    project = tomllib.loads(_pyproject())["project"]
    extra = project["optional-dependencies"]["dev"]
    wanted = [*project["dependencies"], *(p for p in extra if p.startswith(_TEST_PACKAGES))]
    packages = into / f"lib/python{debian.python}/site-packages"
    argv = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    argv += ["--target", str(packages), "--no-compile", "--only-binary=:all:"]
    subprocess.run([*argv, "--python-version", debian.python, *wanted], check=True)
    (packages / "onecopy.pth").write_text(f"{TREE}/src\n")
    (into / "pyvenv.cfg").write_text("home = /usr/bin\n")
    binaries = into / "bin"
    binaries.mkdir()
    (binaries / "python").symlink_to("/usr/bin/python3")
    (binaries / "onecopy").write_text(_LAUNCHER)
    (binaries / "onecopy").chmod(0o755)
    return into


def _compiled(into: Path, store: Store, used: Images, debian: Debian) -> Path:
    """Compile all modules, which takes some seconds here and minutes in an emulated host."""
    into.mkdir()
    python = ["env", "--unset=PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX=/run/results"]
    python += ["ONECOPY_TEST_ACCEL=kvm", "python", "-m"]
    # Modules are not compared with their sources, whose times may differ there.
    every = ["compileall", "-qq", "--invalidation-mode", "unchecked-hash", "-x", "/(test|lib2to3)/"]
    every += [f"/usr/lib/python{debian.python}", f"{PYTHON}/lib", TREE]
    # pytest rewrites the tests' assertions, and keeps those modules apart.
    rewritten = ["pytest", "--collect-only", "-p", "no:cacheprovider", "tests/vm"]
    quiet = ["sh", "-c", 'said=$("$@") || { echo "$said"; exit 1; }', "sh"]
    for argv in (every, rewritten):
        if run_in_root(store, used.named, into, [*quiet, *python, *argv]):
            raise GuestFailed(f"cannot compile the modules for Debian {debian.number}")
    return into


def _tree_files() -> list[Path]:
    """List the project's files: those in git, and new ones that git does not ignore."""
    listed = _output("git", "ls-files", "-co", "--exclude-standard", "-z")
    return sorted(path for name in listed.split("\0") if name and (path := PROJECT / name).exists())


def _tree_digest() -> str:
    digest = hashlib.sha256()
    for path in _tree_files():
        digest.update(f"{path.relative_to(PROJECT)} {path.stat().st_mode:o}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tree(into: Path) -> Path:
    for path in _tree_files():
        target = into / path.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return into
