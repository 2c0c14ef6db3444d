"""Gives a guest a network card with a MAC and IP address that no other guest has.

In a user-mode network, which each guest has for itself, this module assigns the IP address. In a
bridge the guest gets one by DHCP. Not here: published ports (ports.py), QEMU's arguments
(vmm/argv.py), the settings in the guest (identity.py, images/files/start).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from onecopy.errors import InvalidInput
from onecopy.guest.ports import Ports
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import tap
from onecopy.vmm import closed_network, router
from onecopy.vmm.argv import FIRST_ADDRESS, NETWORK, Nic
from onecopy.vmm.vmm_user import User, have_own_numbers

#: The number of addresses for user-mode guests; after that many they repeat.
_ADDRESSES = int(NETWORK.broadcast_address) - int(FIRST_ADDRESS)


class Network(msgspec.Struct, frozen=True):
    """The network options of a guest."""

    card: bool = True
    """Whether the guest has a network card."""
    bridge: str = ""
    """The host's bridge to connect to; "" for a user-mode network."""
    allow_host: bool = False
    """Whether the guest reaches the host's listening ports from a user-mode network."""

    def require_sense(self, publish: Ports) -> None:
        """Raise InvalidInput for options, or ports to publish, that exclude each other."""
        if not self.card and (self.bridge or publish or self.allow_host):
            raise InvalidInput(
                "the guest has no network card",
                hint="omit --bridge, -p and --allow-host, or save it again without --no-network",
            )
        if self.bridge and publish:
            raise InvalidInput(
                "ports can be published from a user-mode network only, not from a bridge",
                hint="omit -p: a guest in a bridge has an address of the bridge's network",
            )
        if self.bridge and self.allow_host:
            raise InvalidInput(
                "--allow-host applies to a user-mode network only, not to a bridge",
                hint="omit it: the bridge's network decides what the guest reaches",
            )


@contextlib.contextmanager
def new_nic(
    folder: Path, wanted: Network, number: int, *, connected: bool = True
) -> Iterator[Nic | None]:
    """Yield a network card for a new guest; None for a guest without one.

    Args:
        folder: The guest's run directory.
        wanted: Its network options.
        number: A number that no other guest has; the IP address follows from it.
        connected: Whether to connect the card to its bridge now, or later with `connect_tap`.

    Raises:
        NotFound, NotPermitted, Incompatible: The bridge or the user-mode network cannot be used.
    """
    if not wanted.card:
        yield None
        return
    if wanted.bridge:
        fd = tap.open_tap(wanted.bridge, connected=connected)
        try:
            yield Nic(_mac(), "", fd)
        finally:
            os.close(fd)
        return
    address = str(FIRST_ADDRESS + number % _ADDRESSES)
    if _has_router(wanted):
        with router.way_out(address, folder) as way:
            yield Nic(_mac(), address, way.tap, way.life)
    else:
        yield Nic(_mac(), address, allow_host=wanted.allow_host)


def display_nic(wanted: Network) -> Nic | None:
    """Return a placeholder card for a dry run's command line."""
    if not wanted.card:
        return None
    fd = "FD" if wanted.bridge or _has_router(wanted) else None
    return Nic("52:54:00:12:34:56", "" if wanted.bridge else str(FIRST_ADDRESS), fd)


def check(wanted: Network, publish: Ports, accel: str) -> None:
    """Check the options without making a card; `rehearse` checks what only an attempt shows.

    Raises:
        InvalidInput: The options exclude each other.
        OnecopyError: Any error of `new_nic`.
    """
    wanted.require_sense(publish)
    if wanted.bridge:
        tap.require_possible(wanted.bridge)
    elif _has_router(wanted):
        router.find_programs()
    elif wanted.card and not wanted.allow_host:
        closed_network.check(accel)


def rehearse(wanted: Network) -> None:
    """Try to set up a user-mode network; raise Incompatible."""
    if wanted.card and _has_router(wanted):
        router.rehearse()


def _has_router(wanted: Network) -> bool:
    return not (wanted.bridge or wanted.allow_host or have_own_numbers())


def can_be_closed(host: Runtime, record: GuestRecord) -> bool:
    """Return whether a standby guest, perhaps of an older onecopy, is closed off from the host."""
    there = router.is_there(host.run / record.name)
    return there or not record.mac or closed_network.is_closed(User.of(record.pid))


def require_closed(record: GuestRecord, folder: Path) -> None:
    """Apply the rules that close a standby guest off from this host.

    Raises:
        Incompatible: The rules cannot be applied.
    """
    if record.mac and not router.is_there(folder):
        closed_network.require(User.of(record.pid), "")


def _mac() -> str:
    """Return a random MAC address, locally administered and unicast (IEEE 802c)."""
    first, *rest = os.urandom(6)
    return ":".join(f"{byte:02x}" for byte in ((first & 0xFC) | 0x02, *rest))
