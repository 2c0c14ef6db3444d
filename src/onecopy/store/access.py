"""Who may load what: trust domains, restricted names, grants.

It belongs to a name and so to all its versions, also those to come. It is kept in the annotations
of ``index.json``, as ``org.onecopy.access.NAME``: changed in one write with the names. Not here:
how blobs of different domains are kept apart (domain.py).
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
    """The trust domain; "" is the default one."""
    restricted: bool = False
    grants: tuple[str, ...] = ()
    """Patterns (fnmatch) of guests' names, or ``domain:PATTERN``; of use if it is restricted."""


def check_domain(text: str) -> str:
    """Return ``text`` if it can name a trust domain ("" is the default one); raise InvalidInput."""
    if text and not _DOMAIN.fullmatch(text):
        raise InvalidInput(
            f"{text!r} is not a valid trust domain",
            hint="use 1-32 of a-z 0-9 - and begin and end with a letter or digit",
        )
    return text


def check_grant(text: str) -> str:
    """Return ``text`` if it can be a grant; raise InvalidInput."""
    if not _GRANT.fullmatch(text):
        raise InvalidInput(
            f"{text!r} is not a valid grant",
            hint="give a guest's name, a pattern such as web-*, or domain:NAME",
        )
    return text


def require(name: str, access: Access, guest: str, domain: str) -> None:
    """Raise OtherDomain, or Restricted, unless a guest of ``domain`` may load ``name``."""
    if access.domain != domain:
        raise OtherDomain(
            f"{name} belongs to {described(access.domain)}, and {guest} to {described(domain)}",
            hint=f"`onecopy tag {name} NEW --domain {domain or '-'}` makes a copy there",
        )
    if access.restricted and not is_granted(access.grants, guest, domain):
        raise Restricted(
            f"{name} is restricted, and {guest} is not granted it",
            hint=f"`onecopy grant {name} {guest}`",
        )


def is_granted(grants: Sequence[str], guest: str, domain: str) -> bool:
    """Whether one of ``grants`` is meant for a guest of ``domain``."""
    return any(
        fnmatch.fnmatchcase(domain, grant.removeprefix("domain:"))
        if grant.startswith("domain:")
        else fnmatch.fnmatchcase(guest, grant)
        for grant in grants
    )


def described(domain: str) -> str:
    """For a reader."""
    return f"the trust domain {domain}" if domain else "the default trust domain"


def of(index: Index, name: str) -> Access:
    """What the index says of ``name``; raise StoreDamaged."""
    try:
        return msgspec.json.decode(index.annotations.get(_KEY + name, "{}"), type=Access)
    except (msgspec.MsgspecError, RecursionError) as error:
        # Never taken for unrestricted.
        raise StoreDamaged(
            f"who may load {name} cannot be read from index.json: {error}",
            hint=f"correct or delete its annotation {_KEY}{name}",
        ) from error


def bind(index: Index, name: str, access: Access) -> Index:
    """``index`` with ``access`` for ``name``."""
    rest = {key: value for key, value in index.annotations.items() if key != _KEY + name}
    if access != Access():
        rest[_KEY + name] = msgspec.json.encode(access).decode()
    return msgspec.structs.replace(index, annotations=rest)


def prune(index: Index) -> Index:
    """``index`` without access for names that have no version any more."""
    there = {ref.name for entry in index.manifests if (ref := names.reference(entry))}
    rest = {
        key: value
        for key, value in index.annotations.items()
        if not key.startswith(_KEY) or key.removeprefix(_KEY) in there
    }
    return msgspec.structs.replace(index, annotations=rest)
