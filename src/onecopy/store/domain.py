"""Keep the blobs of trust domains apart: equal content in two domains is never the same file.

Guests that map one file share its pages, and sharing is visible through timing. So a blob of a
domain has one more page behind its content, which names the domain. This results in another digest,
another file and another copy in memory. Blobs of the default domain have no such trailer, and no
content that looks like one is accepted. So the end of a blob determines its domain.

Not here: who may load an artifact (access.py).
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
    """Return the trailer of a blob of ``domain``; b"" for the default domain."""
    return (_MAGIC + domain.encode()).ljust(PAGE_SIZE, b"\0") if domain else b""


def seal(path: Path, domain: str) -> None:
    """Append the trailer to a new blob.

    Raises:
        InvalidInput: the file ends with a trailer already, like a blob of a domain.
    """
    with path.open("rb") as file:
        if domain_of_file(file.fileno()):
            raise InvalidInput(
                f"{path} ends like the blob of a trust domain",
                hint="append a page of zeroes to the file",
            )
    if domain:
        path.chmod(path.stat().st_mode | 0o200)
        with path.open("ab") as file:
            file.write(trailer(domain))


def unseal(path: Path, domain: str) -> None:
    """Remove the trailer of ``domain`` again, if the file has it."""
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    with path.open("r+b") as file:
        if domain_of_file(file.fileno()) == domain:
            file.truncate(path.stat().st_size - len(trailer(domain)))


def domain_of_file(fd: int) -> str:
    """Return the trust domain that a blob's trailer names; "" without a trailer."""
    end = os.pread(fd, PAGE_SIZE, max(0, os.fstat(fd).st_size - PAGE_SIZE))
    name = end.removeprefix(_MAGIC).rstrip(b"\0").decode("ascii", "replace")
    return name if name and trailer(name) == end else ""


def marks(domain: str, size: int) -> dict[str, str]:
    """Return the annotations of a layer of ``domain`` with ``size`` bytes of content."""
    return {DOMAIN: domain, SIZE: str(size)} if domain else {}


def copy_content(blob: Path, out: Path) -> None:
    """Copy the content of a blob, without its trailer; holes stay holes."""
    with blob.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - len(trailer(domain_of_file(file.fileno())))
        copy_file(file.fileno(), size, out)


def domain_of(blob: Descriptor) -> str:
    """Return the trust domain of a layer."""
    return blob.annotations.get(DOMAIN, "")


def content_size(blob: Descriptor) -> int:
    """Return the size of a layer in bytes, without its trailer."""
    return blob.size - len(trailer(domain_of(blob)))


def has_matching_trailer(blob: Descriptor, path: Path) -> bool:
    """Whether a blob's trailer agrees with the layer's annotations."""
    with path.open("rb") as file:
        found = domain_of_file(file.fileno())
    annotated = {key: text for key, text in blob.annotations.items() if key in MARKS}
    return annotated == marks(found, content_size(blob))
