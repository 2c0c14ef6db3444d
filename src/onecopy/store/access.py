"""Who may load an artifact: trust domains, restricted names and grants.

Access belongs to a name and so to all its versions, future ones included. It is an annotation of
``index.json``, ``org.onecopy.access.NAME``, so that one write changes names and access together.

Not here: how blobs of different domains are kept apart (domain.py).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

import msgspec

from onecopy.errors import InvalidInput, OtherDomain, Restricted, StoreDamaged
from onecopy.store import names
from onecopy.store.oci import Index

_KEY = "org.onecopy.access."
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_GRANT = re.compile(r"(domain:)?[a-z0-9*?\[\]!-]{1,80}")


class Access(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who may load the versions of one name."""

    domain: str = ""
    """The trust domain; "" is the default domain."""
    restricted: bool = False
    grants: tuple[str, ...] = ()
    """For a restricted name: patterns (fnmatch) of guest names, or ``domain:PATTERN``."""


def check_domain(text: str) -> str:
    """Check that a text is a valid name of a trust domain; "" is the default domain.

    Returns:
        ``text``, unchanged.

    Raises:
        InvalidInput: the name is not valid.
    """
    if text and not _DOMAIN.fullmatch(text):
        raise InvalidInput(
            f"{text!r} is not a valid trust domain",
            hint="use 1-32 of a-z 0-9 - and begin and end with a letter or digit",
        )
    return text


def check_grant(text: str) -> str:
    """Check that a text is a valid grant.

    Returns:
        ``text``, unchanged.

    Raises:
        InvalidInput: the grant is not valid.
    """
    if not _GRANT.fullmatch(text):
        raise InvalidInput(
            f"{text!r} is not a valid grant",
            hint="use the name of a guest, a pattern such as web-*, or domain:NAME",
        )
    return text


def require(name: str, access: Access, guest: str, domain: str) -> None:
    """Require that a guest may load an artifact.

    Args:
        name: the artifact's name.
        access: who may load it.
        guest: the guest's name.
        domain: the guest's trust domain.

    Raises:
        OtherDomain: the artifact belongs to another trust domain.
        Restricted: the artifact is restricted, and no grant matches the guest.
    """
    if access.domain != domain:
        raise OtherDomain(
            f"{name} belongs to {describe_domain(access.domain)}, but {guest} to "
            f"{describe_domain(domain)}",
            hint=f"copy it to that domain: onecopy tag {name} NEW --domain {domain or '-'}",
        )
    if access.restricted and not is_granted(access.grants, guest, domain):
        raise Restricted(
            f"{name} is restricted, and {guest} has no grant for it",
            hint=f"grant it: onecopy grant {name} {guest}",
        )


def is_granted(grants: Sequence[str], guest: str, domain: str) -> bool:
    """Whether one of ``grants`` matches a guest of ``domain``."""
    return any(
        fnmatch.fnmatchcase(domain, grant.removeprefix("domain:"))
        if grant.startswith("domain:")
        else fnmatch.fnmatchcase(guest, grant)
        for grant in grants
    )


def describe_domain(domain: str) -> str:
    """Name a trust domain in a message."""
    return f"the trust domain {domain}" if domain else "the default trust domain"


def of(index: Index, name: str) -> Access:
    """Return the access to a name.

    Raises:
        StoreDamaged: the annotation cannot be read.
    """
    try:
        return msgspec.json.decode(index.annotations.get(_KEY + name, "{}"), type=Access)
    except (msgspec.MsgspecError, RecursionError) as error:
        # An unreadable annotation must not make the name unrestricted.
        raise StoreDamaged(
            f"the access to {name} in index.json cannot be read: {error}",
            hint=f"correct or delete the annotation {_KEY}{name}",
        ) from error


def bind(index: Index, name: str, access: Access) -> Index:
    """Return ``index`` with ``access`` set for ``name``."""
    rest = {key: value for key, value in index.annotations.items() if key != _KEY + name}
    if access != Access():
        rest[_KEY + name] = msgspec.json.encode(access).decode()
    return msgspec.structs.replace(index, annotations=rest)


def prune(index: Index) -> Index:
    """Return ``index`` without access for names that have no versions left."""
    present = {ref.name for entry in index.manifests if (ref := names.reference(entry))}
    rest = {
        key: value
        for key, value in index.annotations.items()
        if not key.startswith(_KEY) or key.removeprefix(_KEY) in present
    }
    return msgspec.structs.replace(index, annotations=rest)
