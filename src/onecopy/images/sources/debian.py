"""The source ``debian:SUITE``: a Debian root of chosen packages, made by mmdebstrap.

What differs between two runs with the same packages, and what no two guests may share, is taken
out (images/normalise.py). Not here: single packages (images/deb_packages.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from onecopy.errors import BadSource, CommandFailed, InvalidInput, NotPermitted
from onecopy.images.free_space import disk_is_full, disk_space
from onecopy.images.normalise import normalise
from onecopy.images.tree import clock
from onecopy.subprocesses import find_program, run

#: Room (bytes) that a run takes for packages and root.
NEEDED_BYTES = 600 << 20

_SUITE = re.compile(r"[a-z][a-z0-9-]*")
# A package, and apt's own :ARCH, =VERSION or /SUITE after it; or a task (tasksel(8)).
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*(\^|(:[a-z0-9]+)?([=/][A-Za-z0-9.+:~-]+)?)")
# Documentation nobody maps; licences stay. Of manual pages only the files: update-alternatives(1),
# which Java's packages call, links pages of theirs into the folders.
_DPKG_OPTIONS = (
    "path-exclude=/usr/share/man/*.gz",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)
_BROKEN = re.compile(r"dpkg: error processing (?:package|archive) (\S+)")
_NO_VERSION = re.compile(r"E: (?:Version|Release) '(\S+)' for '(\S+)' was not found")
_NO_PACKAGE = re.compile(r"Unable to locate package (\S+)|Package '(\S+)' has no installation")
_NO_SUITE = re.compile(r"does not have a Release file|404 +Not Found")
_EXPIRED = re.compile(r"Release file for (\S+) is (?:expired|not valid yet)")
# As in Docker's images (apt.conf(5)).
_APT = """\
Acquire::GzipIndexes "true";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
"""
_NO_NETWORK = re.compile(
    r"Could not (connect|resolve)|Unable to connect|Temporary failure|timed out"
)


#: Runs the program that it is given on a machine that is called localhost.
_NAMED = 'echo localhost >/proc/sys/kernel/hostname; exec "$@"'


class DebianSource(msgspec.Struct, frozen=True):
    """``packages`` (sorted) of ``suite`` and what they depend on."""

    suite: str
    packages: tuple[str, ...]
    left_out: list[str] = []

    @property
    def label(self) -> str:
        return f"debian:{self.suite}"

    @property
    def has_systemd(self) -> bool:
        """Whether guests are to start with systemd."""
        return any(package.startswith("systemd") for package in self.packages)

    @property
    def variant(self) -> str:
        """mmdebstrap's package set: essential packages; for systemd also the required ones."""
        return "minbase" if self.has_systemd else "essential"

    @property
    def installed(self) -> tuple[str, ...]:
        """``packages`` and, for systemd, what its units expect.

        Without udev the login on the console waits 90 s; without kmod two units fail.
        """
        return (*self.packages, "udev", "kmod") if self.has_systemd else self.packages

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Install into the empty folder ``into``, as root, and return it (about 20 s).

        Raises BadSource (suite, package, network), NotPermitted, InsufficientResources,
        MissingProgram.
        """
        if os.geteuid() != 0:
            raise NotPermitted(
                f"{self.label} can be built by root only",
                hint="run as root, or build from a folder that you can read: dir:PATH",
            )
        progress(f"installing Debian {self.suite}: {', '.join(self.packages) or self.variant}")
        start = clock(into)
        # In a mount namespace of its own: killed -9, it would leave /sys and more mounted in there.
        # And with a name of its own: install scripts write it into files.
        argv = [
            "unshare",
            "--mount",
            "--uts",
            "sh",
            "-ec",
            _NAMED,
            "sh",
            find_program("mmdebstrap"),
        ]
        argv += [f"--variant={self.variant}", "--format=directory"]
        argv += [f"--dpkgopt={option}" for option in _DPKG_OPTIONS]
        argv += [f"--include={package}" for package in self.installed]
        with disk_space(into, NEEDED_BYTES):
            try:
                run([*argv, self.suite, into])
            except CommandFailed as error:
                if disk_is_full(error):
                    raise
                raise self.explain(error.output) from error
            _spare_memory(into)
            progress("taking out what differs from run to run")
            varying = normalise(into, start)
        if varying:
            progress(f"differs from build to build: {', '.join(varying)}")
        return into

    def explain(self, output: str) -> BadSource:
        """The error for what mmdebstrap printed when it failed."""
        lines = output.strip().splitlines()
        said = "\n".join([line for line in lines if line.startswith("E:")][-8:] or lines[-8:])
        missing = ", ".join(sorted({a or b for a, b in _NO_PACKAGE.findall(output)}))
        if missing:
            what = f"Debian {self.suite} has no package {missing}"
            hint = "check the spelling; packages are separated by commas; of a virtual package "
            hint += "name one that provides it"
        elif absent := _NO_VERSION.search(output):
            what = f"Debian {self.suite} has no {absent[2]} of {absent[1]}"
            hint = f"leave the version out, or see `apt list -a {absent[2]}` in a guest"
        elif broken := _broken(lines):
            what, said = (
                f"the package {broken[0]} of Debian {self.suite} cannot be installed",
                broken[1],
            )
            hint = "leave it out, or install it in a guest that runs, and save that: its install "
            hint += "script failed, as it says above"
        elif expired := _EXPIRED.search(output):
            what = f"the Debian mirror is out of date, or this host's clock is wrong: {expired[1]}"
            hint = "check the clock (`date`), or use another mirror"
        elif _NO_NETWORK.search(output):
            what = "the Debian mirror cannot be reached"
            hint = "check the network and http_proxy; the source can also be tar:PATH or dir:PATH"
        elif _NO_SUITE.search(output):
            what = f"Debian has no suite {self.suite!r}"
            hint = "for example debian:bookworm or debian:trixie"
        else:
            what = f"Debian {self.suite} cannot be installed"
            hint = "the lines above are mmdebstrap's"
        return BadSource(f"{what}\n{said}", hint=hint)


def _spare_memory(tree: Path) -> None:
    """Have apt keep package lists compressed, and no cache of them: all are in a guest's memory."""
    settings = tree / "etc/apt/apt.conf.d"
    if settings.is_dir():
        (settings / "90onecopy").write_text(_APT)


def _broken(lines: Sequence[str]) -> tuple[str, str] | None:
    """The first package that dpkg could not install, and what was printed around that."""
    for number, line in enumerate(lines):
        if found := _BROKEN.search(line):
            return found[1], "\n".join(lines[max(0, number - 6) : number + 3])
    return None


def open_debian(suite: str, include: Sequence[str]) -> DebianSource:
    """The packages ``include`` of ``suite``; raise InvalidInput for what cannot be their names."""
    if not _SUITE.fullmatch(suite):
        raise InvalidInput(f"{suite!r} is not a Debian suite", hint="for example debian:bookworm")
    for package in include:
        if not _PACKAGE.fullmatch(package):
            raise InvalidInput(
                f"{package!r} is not a package name", hint="for example --include python3,curl"
            )
    return DebianSource(suite, tuple(sorted(set(include))))
