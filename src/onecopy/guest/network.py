"""The network card of a guest: an address of hardware and of IP that no other guest has.

In a user-mode network (each guest's own) the address is drawn here; in a bridge its network gives
one by DHCP. Not here: forwarded ports (ports.py), how QEMU is told (vmm/argv.py), how the guest is
(identity.py, build/files/start).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence

from onecopy.errors import InvalidInput
from onecopy.guest.host import Host
from onecopy.guest.ports import Ports
from onecopy.host.tap import open_tap
from onecopy.vmm.argv import FIRST_ADDRESS, GATEWAY, NAME_SERVER, NETWORK, Card

#: How many user-mode guests there can be before an address comes a second time.
_ADDRESSES = int(NETWORK.broadcast_address) - int(FIRST_ADDRESS)


@contextlib.contextmanager
def new_card(host: Host, bridge: str, publish: Ports, *, network: bool) -> Iterator[Card | None]:
    """A card for a new guest; None if it has none. Raises NotFound, NotPermitted, InvalidInput."""
    if not network:
        if bridge or publish:
            raise InvalidInput(
                "the guest has no network card",
                hint="leave out --bridge and -p; or save it again without --no-network",
            )
        yield None
    elif bridge:
        if publish:
            raise InvalidInput(
                "ports are forwarded to a user-mode network, and not into a bridge",
                hint="leave -p out: guests in a bridge have addresses of its network",
            )
        tap = open_tap(bridge)
        try:
            yield Card(_mac(), "", tap)
        finally:
            os.close(tap)
    else:
        yield Card(_mac(), str(FIRST_ADDRESS + host.next_number() % _ADDRESSES))


def shown_card(bridge: str, *, network: bool) -> Card | None:
    """The same, as a command line shows it that is not run."""
    if not network:
        return None
    return Card("52:54:00:12:34:56", *(("", "FD") if bridge else (str(FIRST_ADDRESS), None)))


def inherited(card: Card | None) -> Sequence[int]:
    """The descriptors that the VMM needs for its card."""
    return [card.tap] if card and isinstance(card.tap, int) else []


def settings(card: Card | None) -> str:
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
