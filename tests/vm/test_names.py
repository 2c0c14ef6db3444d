"""Each guest, booted or cloned, resolves localhost and its own name; SSH host keys of any type.

Not here: other parts of the identity (test_identity.py), single cases of /etc/hosts
(tests/unit/images/test_names.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from onecopy.errors import AgentFailed
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.vm.conftest import Boot, RunIn
from tests.vm.guests import Guests

REF = Reference("named")
#: What a program in Python sees: addresses of localhost and of itself, its names.
LOOK = """\
import socket
name = socket.gethostname()
print(socket.gethostbyname("localhost"), socket.gethostbyname(name), name, socket.getfqdn())
"""
#: As an administrator leaves it: a domain, a line of his own, an id for D-Bus alone.
CHANGE = r"""
sed -i 's/^127\.0\.1\.1\t\(.*\)\t#/127.0.1.1\t\1.example.org \1\t#/' /etc/hosts
printf '10.0.0.9 friend' >>/etc/hosts
mkdir -p /var/lib/dbus
cat /proc/sys/kernel/random/uuid | tr -d - >/etc/machine-id
cp /etc/machine-id /var/lib/dbus/machine-id
cat /etc/machine-id
"""
FILES = "cat /etc/hostname /etc/machine-id /var/lib/dbus/machine-id /etc/hosts"
#: Keys of several types and places, and a sshd that has them.
KEYS = """\
cd /etc/ssh && mkdir -p /opt/k /run/sshd
ssh-keygen -q -t ed25519 -N '' -C 'ops@old of old' -f /opt/k/one
ssh-keygen -q -t ecdsa -b 521 -N '' -f ssh_host_odd_name_key && rm ssh_host_odd_name_key.pub
ssh-keygen -q -t rsa -b 2048 -N '' -f ssh_host_rsa_key
for key in /opt/k/one /etc/ssh/ssh_host_odd_name_key /etc/ssh/ssh_host_rsa_key; do
    echo "HostKey $key"
done >sshd_config.d/keys.conf
/usr/sbin/sshd
"""
#: What they are, once all are made.
PUBLIC = """\
while [ -e /run/onecopy/keys.late ]; do sleep 0.2; done
for key in /opt/k/one /etc/ssh/ssh_host_odd_name_key /etc/ssh/ssh_host_rsa_key; do
    ssh-keygen -y -f $key
done
"""
#: The key that sshd shows; it takes no connections while it starts itself anew.
SHOWN = """\
for try in $(seq 60); do
    ssh-keyscan -t ed25519 -T 60 localhost 2>/dev/null | grep ed25519 && break
    sleep 1
done
"""

Restart = Callable[[GuestRecord, str], GuestRecord]


@pytest.fixture
def restart(host: Runtime, guests: Guests) -> Iterator[Restart]:
    """``restart(guest, name)`` saves a running guest and starts a clone, ended after the test."""

    def start(guest: GuestRecord, name: str) -> GuestRecord:
        (clone,) = guests.clone(guests.save(guest, REF).artifact, name=name)
        return clone.record

    yield start
    guests.end()
    if host.store.find(REF, "system"):
        host.store.remove(REF)


def test_a_root_of_debian(
    boot: Boot, python_root: Artifact, run_in: RunIn, restart: Restart
) -> None:
    guest = boot(python_root, memory=128 * MIB)
    look = run_in(guest, "python3", "-c", LOOK).stdout.decode().split()
    assert look == ["127.0.0.1", "127.0.1.1", guest.name, guest.name]
    # Nothing is found by IPv6 that an ordinary machine would not find there.
    assert run_in(guest, "getent", "hosts", "localhost").stdout.split()[0] == b"::1"
    before = run_in(guest, "sh", "-c", CHANGE).stdout.decode().strip()
    assert re.fullmatch("[0-9a-f]{32}", before)
    files = run_in(guest, "sh", "-c", FILES).stdout

    clone = restart(guest, "another-name")
    # It is saved as it is, and goes on so.
    assert run_in(guest, "sh", "-c", FILES).stdout == files
    look = run_in(clone, "python3", "-c", LOOK).stdout.decode().split()
    assert look == ["127.0.0.1", "127.0.1.1", clone.name, f"{clone.name}.example.org"]
    name, new, for_bus, *hosts = run_in(clone, "sh", "-c", FILES).stdout.decode().splitlines()
    assert (name, new) == (clone.name, for_bus)
    assert re.fullmatch("[0-9a-f]{32}", new)
    assert new != before
    # What the package netbase has put there stays.
    assert hosts[0] == "127.0.0.1\tlocalhost"
    assert hosts[-2:] == [
        f"127.0.1.1\t{clone.name}.example.org {clone.name}\t# onecopy",
        "10.0.0.9 friend",
    ]


def test_a_root_without_etc(
    boot: Boot, static_root: Artifact, run_in: RunIn, restart: Restart
) -> None:
    guest = boot(static_root, memory=128 * MIB)
    for each in (guest, restart(guest, "longer-than-the-one-before")):
        for name, address in (("localhost", b"127.0.0.1"), (each.name, b"127.0.1.1")):
            said = run_in(each, "ping", "-c", "1", name).stdout
            assert b"(%s)" % address in said
            assert b" 1 packets received" in said
        files = run_in(each, "ls", "/etc").stdout.decode().split()
        assert files == ["hosts", "nsswitch.conf", "resolv.conf"]


def test_host_keys_of_any_type(
    host: Runtime, services_root: Artifact, boot: Boot, run_in: RunIn, restart: Restart
) -> None:
    guest = boot(services_root, memory=192 * MIB, command="")
    assert run_in(guest, "sh", "-ec", KEYS, timeout=300).exit_code == 0

    def public(guest: GuestRecord) -> list[list[str]]:
        said = run_in(guest, "sh", "-c", PUBLIC, timeout=300).stdout.decode()
        return [line.split() for line in said.splitlines()]

    mine = public(guest)
    assert [each[0] for each in mine] == ["ssh-ed25519", "ecdsa-sha2-nistp521", "ssh-rsa"]
    clone = restart(guest, "keyed")
    # That one is there when the clone is handed out.
    first = run_in(clone, "cat", "/opt/k/one.pub").stdout.decode().split()
    assert first[2:] == ["ops@keyed"]
    assert first[1] in run_in(clone, "sh", "-c", SHOWN, timeout=300).stdout.decode().split()
    own = public(clone)
    assert [each[0] for each in own] == [each[0] for each in mine]
    assert own[0][1] == first[1]
    assert not {each[1] for each in own} & {each[1] for each in mine}
    bits = run_in(clone, "ssh-keygen", "-l", "-f", "/etc/ssh/ssh_host_rsa_key").stdout.split()[0]
    assert bits == b"2048"
    assert public(guest) == mine

    # What clones could not do is refused before anything is stored.
    before = host.store.resolve(REF, "system").digest
    for change, said in (
        ("ssh-keygen -q -p -P '' -N secret -f /opt/k/one", "passphrase.*/opt/k/one"),
        ("rm /opt/k/one && echo no >/opt/k/one", "cannot read.*/opt/k/one"),
        ("mv /usr/bin/ssh-keygen /opt/", "no ssh-keygen"),
        (
            "rm /opt/k/one && mv /opt/ssh-keygen /usr/bin/ && touch /opt/k/one-cert.pub "
            "&& echo HostCertificate /opt/k/one-cert.pub >>/etc/ssh/sshd_config.d/keys.conf",
            "certificate.*/opt/k/one-cert.pub",
        ),
    ):
        assert run_in(guest, "sh", "-ec", change).exit_code == 0, change
        with pytest.raises(AgentFailed, match=said) as caught:
            restart(guest, "never")
        assert caught.value.hint
        assert host.store.resolve(REF, "system").digest == before
