"""What script/test-kvm can do in an emulated host.

One function each, which returns what went wrong. Not here: the host itself (host.py), the programs
that run in it (inside, matrix, bench).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import mix
from onecopy.errors import OnecopyError
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Reference
from vmtest import support, verdict
from vmtest.host import INSIDE, MEMORY, RESULTS, EmulatedHost, emulated_host
from vmtest.images import PROJECT, RELEASES, Debian, ensure_debian, ensure_images, store_root

#: Seconds that one emulated host may take for all it is to do.
LIMIT = 7200.0
#: The first two build Debian roots from a mirror, and an emulated host has no network; the last
#: boots emulated hosts. Under KVM they would show nothing else.
_ELSEWHERE = tuple(
    f"--ignore=tests/vm/test_{name}.py" for name in ("build_debian", "tutorial", "vmtest")
)

#: Beside tests/vm: a workload, and power cuts.
_WORKLOADS = "tests/workloads/test_short.py"
#: Bytes: a machine of 10 GiB can do the smoke tests.
_SMOKE_MEMORY = 6144 * MIB
#: Where an emulated host has the root of the guests that are compared.
_COMPARE_ROOT = "/opt/onecopy/compare-root"
_SUITES = tuple(release.suite for release in RELEASES.values())

Job = Callable[[Debian, Path, Sequence[str]], Awaitable[list[str]]]
"""(release, folder for results, arguments for pytest or compare) -> what went wrong."""


def tell(text: str) -> None:
    """A line for who waits."""
    print(f"test-kvm: {text}", file=sys.stderr, flush=True)


async def tests(
    debian: Debian, out: Path, arguments: Sequence[str], memory: int = MEMORY
) -> list[str]:
    """All VM tests, or what ``arguments`` say; ``memory`` is the host's, in bytes."""
    wanted = arguments or ["tests/vm", _WORKLOADS, *_ELSEWHERE]
    pytest = ["python", "-m", "pytest", "-p", "no:cacheprovider"]
    folder = out / f"debian-{debian.number}"
    argv = [INSIDE, *pytest, f"--junitxml={RESULTS}/junit.xml", *wanted]
    found = await _in_host(debian, ("bookworm",), folder, argv, memory)
    return [*found, *verdict.tests(folder), *verdict.console(folder)]


async def smoke(debian: Debian, out: Path, arguments: Sequence[str]) -> list[str]:
    """The few tests that script/test runs under KVM, too."""
    wanted = arguments or ["tests/vm", *_ELSEWHERE]
    return await tests(debian, out, ["-m", "smoke", *wanted], _SMOKE_MEMORY)


async def make_support(debian: Debian, out: Path, _: Sequence[str]) -> list[str]:
    """The rows of one release as a host, and docs/support.md with them.

    KVM's in an emulated host; TCG's in its root on this host's kernel, which takes minutes less.
    """
    folder = out / f"support-debian-{debian.number}"
    argv = ["env", "ACCELS=kvm", "vmtest/matrix", *_SUITES]
    found = await _in_host(debian, _SUITES, folder, [INSIDE, *argv])
    found += verdict.console(folder)
    found += _in_root(debian, folder, ["env", "ACCELS=tcg", "vmtest/matrix", *_SUITES])
    return [*found, *_write_support(folder)]


async def moved(debian: Debian, out: Path, _: Sequence[str]) -> list[str]:
    """Systems saved under one release's QEMU and started under the other's: rows of support.md."""
    folder = out / f"moved-debian-{debian.number}"
    (other,) = (release for release in RELEASES.values() if release is not debian)
    found = await _in_host(
        debian, _SUITES, folder, [INSIDE, "env", "ACCELS=kvm", "vmtest/moved"], other=other
    )
    found += verdict.console(folder)
    found += _in_root(debian, folder, ["env", "ACCELS=tcg", "vmtest/moved"], other)
    return [*found, *_write_support(folder)]


def _in_root(
    debian: Debian, folder: Path, argv: list[str], other: Debian | None = None
) -> list[str]:
    """Run ``argv`` in a release's root on this host's kernel (vmtest/chroot); what went wrong."""
    host = Runtime.open(store_root())
    images = ensure_images(host, debian, _SUITES, tell, other)
    refs = (images.root, *(ref for ref, _ in images.mounted))
    paths = [str(host.store.resolve(ref).layer("image").path) for ref in refs]
    names = ("ROOT", "PYTHON", "TREE", "STORE", "OTHER_ROOT", "OTHER_PYTHON")
    env = dict(zip(names, paths, strict=False))
    env |= {"RESULTS": str(folder.resolve()), "PATH": os.environ["PATH"]}
    code = subprocess.run([PROJECT / "vmtest/chroot", *argv], env=env).returncode
    return [f"{argv} ended with exit code {code}"] if code else []


def _write_support(folder: Path) -> list[str]:
    """docs/support.md with the rows in ``folder``; what went wrong in them."""
    try:
        lines = (folder / "support").read_text().splitlines()
    except FileNotFoundError:
        return ["no combination came to its end"]
    new = [support.Row(**json.loads(line)) for line in lines]
    rows = support.merge(PROJECT / "docs/support.json", new)
    (PROJECT / "docs/support.md").write_text(support.to_markdown(rows))
    return [f"{row.key}: {row.reason}" for row in new if row.result == "failed"]


async def bench(debian: Debian, out: Path, _: Sequence[str]) -> list[str]:
    """Figures under KVM, whose times an emulated host makes long, and under TCG (vmtest/bench)."""
    folder = out / f"bench-debian-{debian.number}"
    found = await _in_host(debian, _SUITES, folder, [INSIDE, "vmtest/bench", "kvm"])
    return [*found, *verdict.console(folder), *_in_root(debian, folder, ["vmtest/bench", "tcg"])]


async def compare(debian: Debian, out: Path, arguments: Sequence[str]) -> list[str]:
    """The comparison (script/compare) under KVM, with ``arguments``; no plots are drawn of it."""
    root = ensure_debian(Runtime.open(store_root()), "compare-root", mix.SOURCE, mix.PACKAGES, tell)
    folder = out / f"compare-debian-{debian.number}"
    wanted = arguments or ["--guests", "4", "--different", "0"]
    argv = [INSIDE, "vmtest/compare", _COMPARE_ROOT, *wanted]
    more = ((root, _COMPARE_ROOT),)
    return [
        *await _in_host(debian, ("bookworm",), folder, argv, more=more),
        *verdict.console(folder),
    ]


async def _in_host(
    debian: Debian,
    suites: tuple[str, ...],
    folder: Path,
    argv: list[str],
    memory: int = MEMORY,
    other: Debian | None = None,
    more: tuple[tuple[Reference, str], ...] = (),
) -> list[str]:
    """Boot a host, run ``argv`` in it, bring the results to ``folder``; return what went wrong.

    ``more`` are (segment, mount point) pairs that it has besides.
    """
    host = Runtime.open(store_root())
    images = ensure_images(host, debian, suites, tell, other)
    images = replace(images, mounted=(*images.mounted, *more))
    tell(f"booting Debian {debian.number}")
    began = time.monotonic()
    try:
        async with emulated_host(host, images, folder, memory) as emulated:
            tell(f"it is up after {time.monotonic() - began:.0f} s")
            code = await _call(emulated, argv)
    except OnecopyError as error:
        return [error.message]
    finally:
        tell(f"Debian {debian.number}: {time.monotonic() - began:.0f} s; logs are in {folder}")
    return [f"it ended with exit code {code}"] if code else []


async def _call(emulated: EmulatedHost, argv: list[str]) -> int:
    try:
        code = await emulated.call(argv, LIMIT, _show)
    except OnecopyError:
        tell(f"its processors are at:\n{await emulated.processors()}")
        # What went wrong first is the one to tell.
        with suppress(OnecopyError):
            await emulated.fetch()
        raise
    await emulated.fetch()
    return code


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
