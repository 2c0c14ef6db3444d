"""script/test-kvm: the tests under real KVM, in an emulated host."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from onecopy.errors import OnecopyError
from onecopy.guest.host import Host
from rig.host import INSIDE, RESULTS, EmulatedHost, emulated_host
from rig.images import PROJECT, RELEASES, Debian, ensure_images, store_root
from rig.verdict import problems

#: Seconds that one emulated host's tests may take.
LIMIT = 3600.0
#: These build Debian roots from the network, which an emulated host does not have; under KVM they
#: would show nothing else.
_ELSEWHERE = ("--ignore=tests/vm/test_build_debian.py",)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/test-kvm",
        usage="%(prog)s [smoke] [--debian {12,13}] [--out FOLDER] [-- PYTEST-ARGUMENT...]",
        description="Run the VM tests under real KVM, in an emulated host.",
    )
    parser.add_argument("what", nargs="?", choices=["all", "smoke"], default="all")
    parser.add_argument(
        "--debian",
        type=int,
        choices=sorted(RELEASES),
        action="append",
        help="default: all (smoke: 13)",
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


async def _one(debian: Debian, arguments: argparse.Namespace) -> list[str]:
    """Run what is asked for in one emulated host; return what speaks against a pass."""
    folder = arguments.out / f"debian-{debian.number}"
    host = Host.open(store_root())
    images = ensure_images(host, debian, ("bookworm",), _tell)
    _tell(f"booting Debian {debian.number}")
    began = time.monotonic()
    code: int | None = None
    trouble = []
    try:
        async with emulated_host(host, images, folder) as emulated:
            _tell(f"it is up after {time.monotonic() - began:.0f} s")
            code = await _tests(emulated, arguments)
    except OnecopyError as error:
        trouble.append(error.message)
    _tell(f"Debian {debian.number}: {time.monotonic() - began:.0f} s; logs are in {folder}")
    return [f"Debian {debian.number}: {text}" for text in (*trouble, *problems(folder, code))]


async def _tests(emulated: EmulatedHost, arguments: argparse.Namespace) -> int:
    argv = [INSIDE, "python", "-m", "pytest", "-p", "no:cacheprovider"]
    argv += [f"--junitxml={RESULTS}/junit.xml"]
    argv += ["-m", "smoke"] if arguments.what == "smoke" else []
    argv += arguments.pytest or ["tests/vm", *_ELSEWHERE]
    try:
        return await emulated.call(argv, LIMIT, _show)
    finally:
        await emulated.fetch()


async def _all(arguments: argparse.Namespace) -> list[str]:
    task = asyncio.current_task()
    if task:
        # As on Ctrl-C: the emulated host is ended.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    found = []
    for number in arguments.debian:
        found += await _one(RELEASES[number], arguments)
    return found


def main() -> int:
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
    _tell("FAILED" if found else "passed under KVM")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
