"""The jobs of script/test-kvm.

Each is a function that returns a list of problems. Not here: the emulated host (host.py), the
programs that run in it (inside, matrix, bench).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import mix
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Reference
from tests.vm.kept import SERVICES, builders_digest
from vmtest import boot, support, verdict
from vmtest.boot import tell
from vmtest.host import INSIDE, MEMORY, RESULTS, SILENCE
from vmtest.images import (
    PROJECT,
    RELEASES,
    Debian,
    Images,
    ensure_debian,
    ensure_images,
    store_root,
)
from vmtest.root import run_in_root

#: The first two build Debian roots from the network, which an emulated host does not have. The
#: last boots emulated hosts. KVM makes no difference to any of them.
_ELSEWHERE = tuple(
    f"--ignore=tests/vm/test_{name}.py" for name in ("build_debian", "tutorial", "vmtest")
)

#: Tests beside tests/vm: a workload, and power cuts.
_WORKLOADS = "tests/workloads/test_short.py"
#: The mark of smoke tests (pyproject.toml).
_SMOKE = "pytest.mark.smoke"
#: RAM of the host for smoke tests, so that a machine with 10 GiB can run them.
_SMOKE_MEMORY = 6144 * MIB
#: Seconds without output of a measurement, which has long steps.
_MEASURING = 3600.0
#: Mount point in an emulated host of the root for compared guests.
_COMPARE_ROOT = "/opt/onecopy/compare-root"
_SUITES = tuple(release.suite for release in RELEASES.values())
#: Roots of guests: for the tests, the smoke tests, and guests of each suite.
_ROOTS = (Reference("python", "bookworm"), Reference("systemd", "bookworm"), SERVICES)
_SMOKE_ROOTS = _ROOTS[:1]
_PYTHON_ROOTS = tuple(Reference("python", suite) for suite in _SUITES)

Job = Callable[[Debian, Path, Sequence[str]], list[str]]
"""(release, directory for results, arguments for pytest, bench or compare) -> problems."""


def tests(debian: Debian, out: Path, arguments: Sequence[str]) -> list[str]:
    """Run all VM tests, or pytest with ``arguments``."""
    wanted = arguments or ["tests/vm", _WORKLOADS, *_ELSEWHERE]
    return _pytest(debian, out, wanted, _ROOTS, MEMORY)


def _pytest(
    debian: Debian, out: Path, wanted: Sequence[str], roots: tuple[Reference, ...], memory: int
) -> list[str]:
    """Run tests with guests of ``roots``; ``memory`` is the host's RAM in bytes."""
    pytest = ["python", "-m", "pytest", "-p", "no:cacheprovider"]
    folder = out / f"debian-{debian.number}"
    argv = [*pytest, f"--junitxml={RESULTS}/junit.xml", *wanted]
    found = _in_host(_images(debian, roots), folder, argv, memory)
    return [*found, *verdict.tests(folder), *verdict.console(folder)]


def smoke(debian: Debian, out: Path, arguments: Sequence[str]) -> list[str]:
    """Run the few tests that script/test also runs under KVM."""
    # Collecting all tests takes a minute there.
    files = sorted((PROJECT / "tests/vm").rglob("test_*.py"))
    marked = [str(path.relative_to(PROJECT)) for path in files if _SMOKE in path.read_text()]
    wanted = arguments or marked
    return _pytest(debian, out, ["-m", "smoke", *wanted], _SMOKE_ROOTS, _SMOKE_MEMORY)


def make_support(debian: Debian, out: Path, _: Sequence[str]) -> list[str]:
    """Measure the rows of a host release, and regenerate docs/support.md.

    KVM's rows run in an emulated host. TCG's run in its root on this host's kernel, which saves
    minutes.
    """
    folder = out / f"support-debian-{debian.number}"
    argv = ["env", "ACCELS=kvm", "vmtest/matrix", *_SUITES]
    found = _in_host(_images(debian, _PYTHON_ROOTS), folder, argv)
    found += verdict.console(folder)
    found += _in_root(debian, folder, ["env", "ACCELS=tcg", "vmtest/matrix", *_SUITES])
    return [*found, *_write_support(folder)]


def moved(debian: Debian, out: Path, _: Sequence[str]) -> list[str]:
    """Start systems that another release's QEMU saved, and regenerate docs/support.md."""
    folder = out / f"moved-debian-{debian.number}"
    (other,) = (release for release in RELEASES.values() if release is not debian)
    argv = ["env", "ACCELS=kvm", "vmtest/moved"]
    found = _in_host(_images(debian, _PYTHON_ROOTS, other), folder, argv)
    found += verdict.console(folder)
    found += _in_root(debian, folder, ["env", "ACCELS=tcg", "vmtest/moved"], other)
    return [*found, *_write_support(folder)]


def _in_root(
    debian: Debian, folder: Path, argv: list[str], other: Debian | None = None
) -> list[str]:
    """Run ``argv`` in a release's root on this host's kernel (vmtest/chroot); return problems."""
    images = _images(debian, _PYTHON_ROOTS, other)
    code = run_in_root(Runtime.open(store_root()).store, images.named, folder, argv)
    return [f"{argv} ended with exit code {code}"] if code else []


def _write_support(folder: Path) -> list[str]:
    """Add the rows in ``folder`` to docs/support.md; return the problems in them."""
    try:
        lines = (folder / "support").read_text().splitlines()
    except FileNotFoundError:
        return ["no combination finished"]
    new = [support.Row(**json.loads(line)) for line in lines]
    rows = support.merge(PROJECT / "docs/support.json", new)
    (PROJECT / "docs/support.md").write_text(support.to_markdown(rows))
    return [f"{row.key}: {row.reason}" for row in new if row.result == "failed"]


def bench(debian: Debian, out: Path, arguments: Sequence[str]) -> list[str]:
    """Measure under KVM in an emulated host, whose times are long, and under TCG (vmtest/bench)."""
    folder = out / f"bench-debian-{debian.number}"
    images = _images(debian, _PYTHON_ROOTS)
    found = _in_host(images, folder, ["vmtest/bench", "kvm", *arguments], silence=_MEASURING)
    tcg = _in_root(debian, folder, ["vmtest/bench", "tcg", *arguments])
    return [*found, *verdict.console(folder), *tcg]


def compare(debian: Debian, out: Path, arguments: Sequence[str]) -> list[str]:
    """Run script/compare under KVM with ``arguments``, without plots."""
    root = ensure_debian(Runtime.open(store_root()), "compare-root", mix.SOURCE, mix.PACKAGES, tell)
    folder = out / f"compare-debian-{debian.number}"
    wanted = arguments or ["--guests", "4", "--different", "0"]
    argv = ["vmtest/compare", _COMPARE_ROOT, *wanted]
    images = _images(debian, ())
    images = replace(images, mounted=(*images.mounted, (root, _COMPARE_ROOT)))
    found = _in_host(images, folder, argv, silence=_MEASURING)
    return [*found, *verdict.console(folder)]


def _images(debian: Debian, roots: tuple[Reference, ...], other: Debian | None = None) -> Images:
    """Build the segments of a host whose guests have ``roots``."""
    return ensure_images(Runtime.open(store_root()), debian, roots, tell, other)


def _in_host(
    images: Images,
    folder: Path,
    argv: list[str],
    memory: int = MEMORY,
    silence: float = SILENCE,
) -> list[str]:
    """Boot a host, run ``argv`` in it, and fetch the results to ``folder``; return problems."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tell(f"booting an emulated host; its logs go to {folder}")
    job = boot.Job(images, memory, [INSIDE, builders_digest(), *argv], silence)
    code = job.run(Runtime.open(store_root()), folder)
    return [f"the job ended with exit code {code}"] if code else []
