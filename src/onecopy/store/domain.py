"""Blobs of trust domains apart: equal content of two domains is never the same file.

Guests that map one file share its pages, and what they share can be told by timing. So a blob of a
domain has a page behind its content that names the domain: another digest, another file, another
copy in memory. The default domain's blobs have none, and none may look as if it had: so the end of
a blob says of which domain it is. Not here: who may load what (access.py).
"""

from __future__ import annotations

import os
from pathlib import Path

from onecopy.errors import InvalidInput
from onecopy.linux.sparse import copy_file
from onecopy.model import PAGE_SIZE
from onecopy.store.oci import Descriptor

#: Annotations of a layer.
DOMAIN = "org.onecopy.domain"
SIZE = "org.onecopy.size"
MARKS = (DOMAIN, SIZE)
_MAGIC = b"onecopy domain\0"


def trailer(domain: str) -> bytes:
    """What follows the content of a blob of ``domain``."""
    return (_MAGIC + domain.encode()).ljust(PAGE_SIZE, b"\0") if domain else b""


def seal(path: Path, domain: str) -> None:
    """Put the trailer behind the content of a new blob.

    Raises InvalidInput if there is one already: it would be the blob of another domain.
    """
    with path.open("rb") as file:
        if domain_of_file(file.fileno()):
            raise InvalidInput(
                f"{path} ends as the blobs of a trust domain do",
                hint="put another page of zeroes behind it",
            )
    if domain:
        path.chmod(path.stat().st_mode | 0o200)
        with path.open("ab") as file:
            file.write(trailer(domain))


def unseal(path: Path, domain: str) -> None:
    """Take the trailer of ``domain`` off again, as far as it was put there."""
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    with path.open("r+b") as file:
        if domain_of_file(file.fileno()) == domain:
            file.truncate(path.stat().st_size - len(trailer(domain)))


def domain_of_file(fd: int) -> str:
    """The trust domain that the end of a blob names; "" if it has no trailer."""
    end = os.pread(fd, PAGE_SIZE, max(0, os.fstat(fd).st_size - PAGE_SIZE))
    name = end.removeprefix(_MAGIC).rstrip(b"\0").decode("ascii", "replace")
    return name if name and trailer(name) == end else ""


def marks(domain: str, size: int) -> dict[str, str]:
    """The annotations of a layer of ``domain`` whose content has ``size`` bytes."""
    return {DOMAIN: domain, SIZE: str(size)} if domain else {}


def copy_content(blob: Path, out: Path) -> None:
    """Copy the content of a blob, without its trailer and its holes."""
    with blob.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - len(trailer(domain_of_file(file.fileno())))
        copy_file(file.fileno(), size, out)


def domain_of(blob: Descriptor) -> str:
    """The trust domain of a layer."""
    return blob.annotations.get(DOMAIN, "")


def content_size(blob: Descriptor) -> int:
    """Bytes of a layer without its trailer."""
    return blob.size - len(trailer(domain_of(blob)))


def is_marked_right(blob: Descriptor, path: Path) -> bool:
    """Whether the end of the blob is what the layer's annotations say."""
    with path.open("rb") as file:
        found = domain_of_file(file.fileno())
    there = {key: text for key, text in blob.annotations.items() if key in MARKS}
    return there == marks(found, content_size(blob))
