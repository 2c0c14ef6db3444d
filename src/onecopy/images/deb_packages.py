"""Single Debian packages, fetched and unpacked but never installed on this host.

mmdebstrap brings its own apt state, so this host's package lists, configuration and release do not
matter. Not here: whole Debian roots (images/sources/debian.py).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from onecopy.errors import BadSource, CommandFailed
from onecopy.linux.removal import remove_tree
from onecopy.subprocesses import run

#: Where this host is not Debian itself.
DEFAULT_SUITE = "trixie"
_HINT = "check the network, and that the suite exists (mmdebstrap needs a Debian mirror)"

# Runs in mmdebstrap, for the first of $ONECOPY_PACKAGES that there is.
_DOWNLOAD = """
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
cd "$ONECOPY_DOWNLOADS"
for name in $ONECOPY_PACKAGES; do
    real=$(apt-cache depends --important "$name" 2>/dev/null |
        sed -n 's/^ *Depends: //p' | head -n 1)
    case $real in linux-image-*) name=$real ;; esac
    apt-get download "$name" && exit 0
done
exit 1
"""


def host_suite() -> str:
    """Debian suite of this host, for the kernel and the tools: ``bookworm``, ``trixie``..."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return DEFAULT_SUITE
    if release.get("ID") == "debian":
        return release.get("VERSION_CODENAME", DEFAULT_SUITE)
    return DEFAULT_SUITE


def extract_packages(names: Sequence[str], suite: str, into: Path) -> None:
    """Unpack packages and all they depend on into ``into``; raise BadSource."""
    argv = [*_mmdebstrap("extract"), f"--include={','.join(names)}"]
    try:
        run([*argv, suite, into])
    except CommandFailed as error:
        raise BadSource(f"cannot fetch {', '.join(names)}: {error}", hint=_HINT) from error


def _mmdebstrap(variant: str) -> list[str]:
    # Nothing is run of what is unpacked, so no chroot is needed, which only root could make.
    mode = [] if os.geteuid() == 0 else ["--mode=chrootless"]
    return ["mmdebstrap", "--quiet", *mode, f"--variant={variant}"]


def fetch_package(
    candidates: Sequence[str], suite: str, into: Path, progress: Callable[[str], None]
) -> Path:
    """Download the first of ``candidates`` that the suite has; return its .deb file.

    A candidate that is a metapackage stands for the first package it depends on.
    Raises BadSource.
    """
    progress(f"fetching {candidates[-1]} from {suite}")
    root = into / "apt"
    downloads = into / "downloads"
    downloads.mkdir()
    argv = [*_mmdebstrap("custom"), f"--customize-hook={_DOWNLOAD}"]
    # By the environment: a hook is shell text, and no path belongs in there.
    env = {"ONECOPY_DOWNLOADS": os.fspath(downloads), "ONECOPY_PACKAGES": " ".join(candidates)}
    try:
        run([*argv, suite, root], env=env)
    except CommandFailed as error:
        raise BadSource(f"cannot fetch {candidates[-1]}: {error}", hint=_HINT) from error
    remove_tree(root)
    return next(downloads.glob("*.deb"))
