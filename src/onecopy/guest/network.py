"""The network card of a guest: an address of hardware and of IP that no other guest has.

In a user-mode network (each guest's own) the address is drawn here; in a bridge its network gives
one by DHCP. Not here: forwarded ports (ports.py), how QEMU is told (vmm/argv.py), how the guest is
(identity.py, images/files/start).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from onecopy.errors import InvalidInput
from onecopy.guest.ports import Ports
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.linux import tap
from onecopy.vmm import closed_network, router
from onecopy.vmm.argv import FIRST_ADDRESS, GATEWAY, NAME_SERVER, NETWORK, Nic
from onecopy.vmm.vmm_user import User, have_own_numbers

#: How many user-mode guests there can be before an address comes a second time.
_ADDRESSES = int(NETWORK.broadcast_address) - int(FIRST_ADDRESS)


class Network(msgspec.Struct, frozen=True):
    """What a user asks for of a guest's network."""

    card: bool = True
    """False: the guest has none."""
    bridge: str = ""
    """Of the host, to be a port of; "" for a user-mode network."""
    publish: Ports = ()
    allow_host: bool = False
    """Whether a user-mode network reaches what listens on the host."""

    def require_sense(self) -> None:
        """Raise InvalidInput for what does not go together."""
        if not self.card and (self.bridge or self.publish or self.allow_host):
            raise InvalidInput(
                "the guest has no network card",
                hint="leave out --bridge, -p and --allow-host; or save it again without "
                "--no-network",
            )
        if self.bridge and self.publish:
            raise InvalidInput(
                "ports are forwarded to a user-mode network, and not into a bridge",
                hint="leave -p out: guests in a bridge have addresses of its network",
            )
        if self.bridge and self.allow_host:
            raise InvalidInput(
                "--allow-host opens a user-mode network, and not a bridge",
                hint="leave it out: a guest in a bridge reaches what its network lets it reach",
            )


@contextlib.contextmanager
def new_nic(
    host: Runtime, folder: Path, wanted: Network, *, connected: bool = True
) -> Iterator[Nic | None]:
    """A card for a new guest with this run folder; None if it has none.

    One of a bridge is ``connected`` to it, or to be so later (linux/tap.py, connect_tap). Raises
    NotFound, NotPermitted, InvalidInput, Incompatible.
    """
    wanted.require_sense()
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
    address = str(FIRST_ADDRESS + host.next_number() % _ADDRESSES)
    if _has_router(wanted):
        with router.way_out(address, folder) as way:
            yield Nic(_mac(), address, way.tap, way.life)
    else:
        yield Nic(_mac(), address, allow_host=wanted.allow_host)


def display_nic(wanted: Network) -> Nic | None:
    """The same, as a command line shows it that is not run; raise InvalidInput."""
    wanted.require_sense()
    if not wanted.card:
        return None
    fd = "FD" if wanted.bridge or _has_router(wanted) else None
    return Nic("52:54:00:12:34:56", "" if wanted.bridge else str(FIRST_ADDRESS), fd)


def check(wanted: Network, accel: str) -> None:
    """Raise as `new_nic`, and make nothing; what only a try can tell is left out (`rehearse`)."""
    wanted.require_sense()
    if wanted.bridge:
        tap.require_possible(wanted.bridge)
    elif _has_router(wanted):
        router.find_programs()
    elif wanted.card and not wanted.allow_host:
        closed_network.check(accel)


def rehearse(wanted: Network) -> None:
    """Try what `check` leaves out; raise Incompatible."""
    if wanted.card and _has_router(wanted):
        router.rehearse()


def _has_router(wanted: Network) -> bool:
    return not (wanted.bridge or wanted.allow_host or have_own_numbers())


def can_be_closed(host: Runtime, record: GuestRecord) -> bool:
    """Whether a prepared guest, which an older onecopy may have prepared, is kept from the host."""
    there = router.is_there(host.run / record.name)
    return there or not record.mac or closed_network.is_closed(User.of(record.pid))


def require_closed(record: GuestRecord, folder: Path) -> None:
    """Have in force what keeps a guest that is woken from this host; raise Incompatible."""
    if record.mac and not router.is_there(folder):
        closed_network.require(User.of(record.pid), "")


def connecting(card: Nic | None, bridge: str) -> Callable[[], None]:
    """What connects a card to the bridge that it is for, if that was left for later."""
    if not bridge or card is None or not isinstance(card.tap, int):
        return lambda: None
    return partial(tap.connect_tap, card.tap, bridge)


def inherited(card: Nic | None) -> Sequence[int]:
    """The descriptors that the VMM needs for its card."""
    return [fd for fd in (card.tap, card.life) if isinstance(fd, int)] if card else []


def settings(card: Nic | None) -> str:
    """What the guest sets: address, mask, gateway and name server; "dhcp"; or "-" for none."""
    if card is None:
        return "-"
    if not card.address:
        return "dhcp"
    return f"{card.address} {NETWORK.netmask} {GATEWAY} {NAME_SERVER}"


def _mac() -> str:
    """Locally administered, unicast, else random (IEEE 802c: the second digit is 2, 6, a or e)."""
    first, *rest = secrets.token_bytes(6)
    return ":".join(f"{byte:02x}" for byte in ((first & 0xFC) | 0x02, *rest))
