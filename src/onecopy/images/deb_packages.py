"""Fetches and unpacks single Debian packages; never installs them on this host.

mmdebstrap keeps its own apt state. This host's package lists, apt configuration and release do not
matter. Not here: Debian root file systems (images/sources/debian.py).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from onecopy.errors import BadSource, CommandFailed
from onecopy.linux.removal import remove_tree
from onecopy.subprocesses import run

#: The suite of guests on a host that is not Debian.
DEFAULT_SUITE = "trixie"
_HINT = "check the network and the suite's name: mmdebstrap needs a Debian mirror"

# mmdebstrap runs this hook. It downloads the first of $ONECOPY_PACKAGES that the suite has.
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
    """Return this host's Debian suite, for example ``trixie``; `DEFAULT_SUITE` if not Debian."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return DEFAULT_SUITE
    if release.get("ID") == "debian":
        return release.get("VERSION_CODENAME", DEFAULT_SUITE)
    return DEFAULT_SUITE


def extract_packages(names: Sequence[str], suite: str, into: Path) -> None:
    """Unpack packages and their dependencies into the directory ``into``.

    Raises:
        BadSource: The suite or a package cannot be fetched.
    """
    argv = [*_mmdebstrap("extract"), f"--include={','.join(names)}"]
    try:
        run([*argv, suite, into])
    except CommandFailed as error:
        raise BadSource(f"cannot fetch {', '.join(names)}: {error}", hint=_HINT) from error


def _mmdebstrap(variant: str) -> list[str]:
    # No unpacked program runs, so no chroot is needed. Only root could make one.
    mode = [] if os.geteuid() == 0 else ["--mode=chrootless"]
    return ["mmdebstrap", "--quiet", *mode, f"--variant={variant}"]


def fetch_package(
    candidates: Sequence[str], suite: str, into: Path, progress: Callable[[str], None]
) -> Path:
    """Download the first of ``candidates`` that the suite has.

    For a metapackage of a kernel, the image package that it depends on is downloaded.

    Returns:
        The path of the .deb file, below ``into``.

    Raises:
        BadSource: The suite cannot be reached, or has none of the candidates.
    """
    progress(f"fetching {candidates[-1]} from {suite}")
    root = into / "apt"
    downloads = into / "downloads"
    downloads.mkdir()
    argv = [*_mmdebstrap("custom"), f"--customize-hook={_DOWNLOAD}"]
    # A hook is shell text. Paths go through the environment, so they need no quoting.
    env = {"ONECOPY_DOWNLOADS": os.fspath(downloads), "ONECOPY_PACKAGES": " ".join(candidates)}
    try:
        run([*argv, suite, root], env=env)
    except CommandFailed as error:
        raise BadSource(f"cannot fetch {candidates[-1]}: {error}", hint=_HINT) from error
    remove_tree(root)
    return next(downloads.glob("*.deb"))
