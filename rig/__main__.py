"""script/test-kvm: the tests under real KVM, in emulated hosts."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from onecopy.errors import OnecopyError
from onecopy.guest.host import Host
from rig import support, verdict
from rig.host import INSIDE, RESULTS, EmulatedHost, emulated_host
from rig.images import PROJECT, RELEASES, Debian, ensure_images, store_root

#: Seconds that one emulated host may take for all it is to do.
LIMIT = 3600.0
#: The first builds Debian roots from the network, which an emulated host does not have; the second
#: boots emulated hosts. Under KVM they would show nothing else.
_ELSEWHERE = ("--ignore=tests/vm/test_build_debian.py", "--ignore=tests/vm/test_rig.py")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/test-kvm",
        usage="%(prog)s [all|smoke|support] [--debian {12,13}] [--out FOLDER] [-- PYTEST-ARG...]",
        description="Run the VM tests under real KVM, in emulated hosts.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=["all", "smoke", "support"],
        default="all",
        help="all VM tests; the few that script/test runs, too; or docs/support.md made anew",
    )
    parser.add_argument(
        "--debian",
        type=int,
        choices=sorted(RELEASES),
        action="append",
        help="the release of the host; may be repeated (default: all; for smoke: 13)",
    )
    parser.add_argument(
        "--out", type=Path, default=PROJECT / "out/kvm", help="folder for results and logs"
    )
    # argparse cannot tell a last optional argument from the first after "--".
    ours, pytest = _split(sys.argv[1:])
    arguments = parser.parse_args(ours)
    arguments.pytest = pytest
    if not arguments.debian:
        arguments.debian = [13] if arguments.what == "smoke" else sorted(RELEASES, reverse=True)
    return arguments


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


def _tell(text: str) -> None:
    print(f"test-kvm: {text}", file=sys.stderr, flush=True)


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def _tests(debian: Debian, arguments: argparse.Namespace) -> list[str]:
    """Run tests in one emulated host; return what speaks against a pass."""
    argv = [INSIDE, "python", "-m", "pytest", "-p", "no:cacheprovider"]
    argv += [f"--junitxml={RESULTS}/junit.xml"]
    argv += ["-m", "smoke"] if arguments.what == "smoke" else []
    argv += arguments.pytest or ["tests/vm", *_ELSEWHERE]
    folder = arguments.out / f"debian-{debian.number}"
    found = await _in_host(debian, ("bookworm",), folder, argv)
    return [*found, *verdict.tests(folder), *verdict.console(folder)]


async def _support(debian: Debian, arguments: argparse.Namespace) -> list[str]:
    """Make the rows of one host, and docs/support.md with them; return what went wrong."""
    folder = arguments.out / f"support-debian-{debian.number}"
    suites = tuple(release.suite for release in RELEASES.values())
    found = await _in_host(debian, suites, folder, [INSIDE, "sh", "rig/matrix", *suites])
    try:
        lines = (folder / "support").read_text().splitlines()
    except FileNotFoundError:
        return [*found, "no combination came to its end"]
    rows = support.merge(
        PROJECT / "docs/support.json", [support.Row(**json.loads(line)) for line in lines]
    )
    (PROJECT / "docs/support.md").write_text(support.to_markdown(rows))
    failed = [f"{row.key}: {row.reason}" for row in rows if row.result == "failed"]
    return [*found, *failed, *verdict.console(folder)]


async def _in_host(
    debian: Debian, suites: tuple[str, ...], folder: Path, argv: list[str]
) -> list[str]:
    """Boot a host, run ``argv`` in it, bring the results to ``folder``; return what went wrong."""
    host = Host.open(store_root())
    images = ensure_images(host, debian, suites, _tell)
    _tell(f"booting Debian {debian.number}")
    began = time.monotonic()
    try:
        async with emulated_host(host, images, folder) as emulated:
            _tell(f"it is up after {time.monotonic() - began:.0f} s")
            code = await _call(emulated, argv)
    except OnecopyError as error:
        return [error.message]
    finally:
        _tell(f"Debian {debian.number}: {time.monotonic() - began:.0f} s; logs are in {folder}")
    return [f"it ended with exit code {code}"] if code else []


async def _call(emulated: EmulatedHost, argv: list[str]) -> int:
    try:
        return await emulated.call(argv, LIMIT, _show)
    finally:
        await emulated.fetch()


_WHAT: dict[str, Callable[[Debian, argparse.Namespace], Awaitable[list[str]]]] = {
    "all": _tests,
    "smoke": _tests,
    "support": _support,
}


async def _all(arguments: argparse.Namespace) -> list[str]:
    task = asyncio.current_task()
    if task:
        # As on Ctrl-C: the emulated host is ended.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    found = []
    for number in arguments.debian:
        problems = await _WHAT[arguments.what](RELEASES[number], arguments)
        found += [f"Debian {number}: {text}" for text in problems]
    return found


def main() -> int:
    """Run what is asked for; 0 only if nothing speaks against a pass."""
    arguments = _arguments()
    try:
        found = asyncio.run(_all(arguments))
    except OnecopyError as error:
        _tell(f"{error.message}\n{error.hint}".rstrip())
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    for text in found:
        _tell(text)
    _tell("FAILED" if found else "passed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
