"""Removes what differs from build to build from a newly installed Debian root.

That is: times, caches, settings of the build's host, and secrets made by install scripts. Guests
must not share secrets. Each makes its own at boot (files/keys), or its services do. Not here: the
installation (images/sources/debian.py).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from onecopy.images.tree import clamp_times

_REMOVED = (
    "etc/hostname",
    "etc/resolv.conf",
    "etc/passwd-",
    "etc/shadow-",
    "etc/group-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "var/lib/apt/lists/*",
    "var/cache/apt/*.bin",
    "var/cache/debconf/*-old",
    "var/cache/fontconfig/*",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dpkg/*-old",
    "var/log/**/*",
    # Secrets and identities.
    "etc/ssh/ssh_host_*",
    "etc/dropbear/dropbear_*_host_key",
    "etc/ssl/certs/ssl-cert-snakeoil.pem",
    "etc/ssl/private/ssl-cert-snakeoil.key",
    "etc/unbound/unbound_*.key",
    "etc/unbound/unbound_*.pem",
    "var/lib/dbus/machine-id",
    "var/lib/rabbitmq/.erlang.cookie",
    "var/lib/systemd/credential.secret",
    "var/lib/systemd/random-seed",
)
#: A file that differs in two builds -> the parent directory to report, counted from the file.
_VARYING = {
    "var/lib/postgresql/*/*/global/pg_control": 1,
    "var/lib/mysql/ibdata1": 0,
    "var/lib/ldap/data.mdb": 0,
}
_JAVA_KEYS = "etc/ssl/certs/java/cacerts"
#: Magic and version of a Java keystore (JKS), and the salt of its checksum
#: (sun.security.provider.JavaKeyStore).
_JKS, _JKS_SALT = b"\xfe\xed\xfe\xed\x00\x00\x00\x02", b"Mighty Aphrodite"
_JKS_PASSWORD = "changeit".encode("utf-16-be")
_CERTIFICATE = 2


def normalise(tree: Path, start: float) -> list[str]:
    """Remove from ``tree`` what differs from build to build.

    Files from packages keep their times, because Python's .pyc files depend on them.

    Args:
        tree: The root directory of the new installation.
        start: The start of the installation, in seconds since 1970.

    Returns:
        The paths below ``tree`` that still differ from build to build.

    Raises:
        OSError: A file cannot be read or written.
    """
    for pattern in _REMOVED:
        for path in tree.glob(pattern):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
    _remove_links(tree / "etc/ssl/certs", "ssl-cert-snakeoil.pem")
    # With an empty file systemd makes a new ID. With a missing one it also runs first-boot set-up.
    machine_id = tree / "etc/machine-id"
    machine_id.unlink(missing_ok=True)
    machine_id.touch(0o444)
    limit = clamp_times(tree, start)
    _set_password_days(tree / "etc/shadow", limit // 86400)
    _set_dates(tree / _JAVA_KEYS, limit)
    clamp_times(tree, start)
    return sorted(str(path.relative_to(tree)) for path in _varying(tree))


def _remove_links(folder: Path, target: str) -> None:
    """Remove the links to ``target`` that openssl named after the hash of a removed certificate."""
    for path in folder.glob("*.[0-9]"):
        if path.is_symlink() and str(path.readlink()) == target:
            path.unlink()


def _varying(tree: Path) -> Iterator[Path]:
    for pattern, above in _VARYING.items():
        for path in tree.glob(pattern):
            yield path.parents[above]


def _set_password_days(shadow: Path, day: int) -> None:
    """Set the day of the last password change (shadow(5)) of all users."""
    if shadow.is_file() and not shadow.is_symlink():
        users = [line.split(":") for line in shadow.read_text().splitlines()]
        shadow.write_text("".join(":".join([*u[:2], str(day), *u[3:]]) + "\n" for u in users))


def _set_dates(keystore: Path, seconds: int) -> None:
    """Set the date of all certificates in a Java keystore; skip a file of any other format."""
    if keystore.is_symlink() or not keystore.is_file():
        return
    data = bytearray(keystore.read_bytes())
    try:
        end = _date_entries(data, struct.pack(">Q", seconds * 1000))
    except (IndexError, struct.error):
        return
    if end + hashlib.sha1().digest_size == len(data):  # noqa: S324 - the format's
        digest = hashlib.sha1(_JKS_PASSWORD + _JKS_SALT + data[:end])  # noqa: S324
        _write_in_place(keystore, bytes(data[:end]) + digest.digest())


def _date_entries(data: bytearray, date: bytes) -> int:
    """Write ``date`` into each entry of a JKS keystore that holds only certificates.

    Returns the offset of the end of the entries; -1 for any other format. Raises IndexError or
    struct.error if the data is truncated.
    """
    if not data.startswith(_JKS):
        return -1
    (count,) = struct.unpack_from(">I", data, 8)
    at = 12
    for _ in range(count):
        tag, alias = struct.unpack_from(">IH", data, at)
        if tag != _CERTIFICATE:
            return -1
        at += 6 + alias
        data[at : at + 8] = date
        at += 8
        (kind,) = struct.unpack_from(">H", data, at)
        at += 2 + kind
        (size,) = struct.unpack_from(">I", data, at)
        at += 4 + size
    return at


def _write_in_place(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)
        file.flush()
        os.ftruncate(file.fileno(), len(content))
