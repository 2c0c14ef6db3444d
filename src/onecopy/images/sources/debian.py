"""The source ``debian:SUITE``: a Debian root with chosen packages, installed by mmdebstrap.

Not here: removing what differs between builds, and secrets (images/normalise.py); single packages
(images/deb_packages.py).
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

#: Bytes of free disk space that an installation needs.
NEEDED_BYTES = 600 << 20

_SUITE = re.compile(r"[a-z][a-z0-9-]*")
# A package with apt's optional :ARCH, =VERSION or /SUITE; or a task (tasksel(8)).
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*(\^|(:[a-z0-9]+)?([=/][A-Za-z0-9.+:~-]+)?)")
# Guests do not need documentation; licences stay. The directories of manual pages stay, too: the
# install scripts of Java's packages make links in them (update-alternatives(1)).
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
# The same settings as in Docker's images (apt.conf(5)).
_APT = """\
Acquire::GzipIndexes "true";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
"""
_NO_NETWORK = re.compile(
    r"Could not (connect|resolve)|Unable to connect|Temporary failure|timed out"
)


#: Sets the hostname to localhost, then runs the program in its arguments.
_AS_LOCALHOST = 'echo localhost >/proc/sys/kernel/hostname; exec "$@"'


class DebianSource(msgspec.Struct, frozen=True):
    """``packages`` (sorted) of ``suite``, with their dependencies."""

    suite: str
    packages: tuple[str, ...]
    left_out: list[str] = []

    @property
    def label(self) -> str:
        return f"debian:{self.suite}"

    @property
    def has_systemd(self) -> bool:
        """Whether guests start with systemd."""
        return any(package.startswith("systemd") for package in self.packages)

    @property
    def variant(self) -> str:
        """mmdebstrap's package set: essential packages; with systemd also the required ones."""
        return "minbase" if self.has_systemd else "essential"

    @property
    def installed(self) -> tuple[str, ...]:
        """``packages`` and, with systemd, the packages that its units need.

        Without udev the login on the console waits 90 s. Without kmod two units fail.
        """
        return (*self.packages, "udev", "kmod") if self.has_systemd else self.packages

    def unpack(self, into: Path, progress: Callable[[str], None]) -> Path:
        """Install into the empty directory ``into`` (about 20 s); only root can.

        Returns:
            ``into``.

        Raises:
            BadSource: The suite or a package is unknown, or the mirror cannot be reached.
            NotPermitted, InsufficientResources, MissingProgram: As their names say.
        """
        if os.geteuid() != 0:
            raise NotPermitted(
                f"only root can build from {self.label}",
                hint="build from a directory that you can read: dir:PATH, or run as root",
            )
        progress(f"installing Debian {self.suite}: {', '.join(self.packages) or self.variant}")
        start = clock(into)
        # A mount namespace, because a killed mmdebstrap would leave mounts such as /sys in `into`.
        # A UTS namespace, because install scripts write the hostname into files.
        argv = [
            "unshare",
            "--mount",
            "--uts",
            "sh",
            "-ec",
            _AS_LOCALHOST,
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
            _configure_apt(into)
            progress("removing what differs from build to build")
            varying = normalise(into, start)
        if varying:
            progress(f"differs from build to build: {', '.join(varying)}")
        return into

    def explain(self, output: str) -> BadSource:
        """Return the error for a failed mmdebstrap with that output."""
        lines = output.strip().splitlines()
        quoted = "\n".join([line for line in lines if line.startswith("E:")][-8:] or lines[-8:])
        missing = ", ".join(sorted({a or b for a, b in _NO_PACKAGE.findall(output)}))
        if missing:
            what = f"Debian {self.suite} has no package {missing}"
            hint = "check the spelling and separate packages by commas; for a virtual package, "
            hint += "name a package that provides it"
        elif absent := _NO_VERSION.search(output):
            what = f"Debian {self.suite} has no {absent[2]} of {absent[1]}"
            hint = f"omit the version, or run `apt list -a {absent[2]}` in a guest"
        elif broken := _broken(lines):
            what = f"the package {broken[0]} of Debian {self.suite} cannot be installed"
            quoted = broken[1]
            hint = "its install script failed, see above: omit the package, or install it in a "
            hint += "running guest and save that guest"
        elif expired := _EXPIRED.search(output):
            what = f"the Debian mirror is outdated, or this host's clock is wrong: {expired[1]}"
            hint = "check the clock with `date`, or use another mirror"
        elif _NO_NETWORK.search(output):
            what = "cannot reach the Debian mirror"
            hint = "check the network and http_proxy, or build from tar:PATH or dir:PATH"
        elif _NO_SUITE.search(output):
            what = f"Debian has no suite {self.suite!r}"
            hint = "use an existing suite, for example debian:bookworm or debian:trixie"
        else:
            what = f"cannot install Debian {self.suite}"
            hint = "see mmdebstrap's output above"
        return BadSource(f"{what}\n{quoted}", hint=hint)


def _configure_apt(tree: Path) -> None:
    """Set apt to compress package lists and cache nothing, because both use RAM in guests."""
    settings = tree / "etc/apt/apt.conf.d"
    if settings.is_dir():
        (settings / "90onecopy").write_text(_APT)


def _broken(lines: Sequence[str]) -> tuple[str, str] | None:
    """Return the first package that dpkg could not install, and the lines around its error."""
    for number, line in enumerate(lines):
        if found := _BROKEN.search(line):
            return found[1], "\n".join(lines[max(0, number - 6) : number + 3])
    return None


def open_debian(suite: str, include: Sequence[str]) -> DebianSource:
    """Return the source for the packages ``include`` of ``suite``.

    Raises:
        InvalidInput: The name of the suite or of a package is malformed.
    """
    if not _SUITE.fullmatch(suite):
        raise InvalidInput(
            f"{suite!r} is not a Debian suite", hint="write, for example, debian:bookworm"
        )
    for package in include:
        if not _PACKAGE.fullmatch(package):
            raise InvalidInput(
                f"{package!r} is not a package name",
                hint="write, for example, --include python3,curl",
            )
    return DebianSource(suite, tuple(sorted(set(include))))
