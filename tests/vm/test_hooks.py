"""Programs with their own random generators are found at the save, and re-seeded by clone hooks.

Without its hook, clones of a program draw the same values; with it they differ. Not here: services
that start slowly (tests/workloads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from onecopy.errors import AgentFailed, InvalidInput
from onecopy.guest.lifecycle.save import Saved
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.model import MIB, Reference
from onecopy.store import Artifact
from tests.hooks_kit import SETTLED, alike, drawn, write
from tests.vm.conftest import Boot, RunIn
from tests.vm.guests import Guests

#: Answers what it draws from OpenSSL's generator, and from Python's, at each request; and draws
#: beforehand, so that both are seeded. SIGHUP starts it anew, in the same process.
APP = """\
import http.server, os, random, signal, ssl, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        words = [ssl.RAND_bytes(8).hex(), str(random.random()), os.urandom(8).hex()]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(" ".join(words).encode())

    def log_message(self, *args):
        pass

signal.signal(signal.SIGHUP, lambda *_: os.execv(sys.executable, ["python3", *sys.argv]))
ssl.RAND_bytes(8), random.random()
server = http.server.HTTPServer(("127.0.0.1", 8000), Handler)
server.serve_forever(poll_interval=0.1)
"""
ASK_APP = f"""\
ask() {{ wget -qO- http://127.0.0.1:8000/; }}
{SETTLED} ask
for n in 1 2 3 4 5 6; do
    set -- $(ask)
    [ -z "$1" ] || printf 'openssl %s\npython %s\nkernel %s\n' $1 $2 $3
done
"""
#: Of the image: run in the order of their names.
FIRST = "#!/bin/sh\necho 1 $(hostname) >>/tmp/ran\n"
SECOND = "#!/bin/sh\necho 2 >>/tmp/ran\n[ ! -e /tmp/bad ] || { echo no luck; exit 4; }\n"

SaveHooked = Callable[..., Saved]


#: Debian 13 with services that hold random generators of their own.
DAEMONS = Reference("daemons", "trixie")
DAEMONS_PACKAGES = (
    *("systemd-sysv", "dbus", "openssh-server"),
    *("redis-server", "nginx", "python3"),
)


@pytest.fixture
def save(host: Runtime, guests: Guests) -> Iterator[SaveHooked]:
    """``save(guest, *hooks)`` saves it with these clone hooks."""
    ref = Reference("hooked")

    def now(guest: GuestRecord, *hooks: str, command: str = "") -> Saved:
        return guests.save(guest, ref, clone_hooks=[*(hooks or ("none",)), f"command:{command}"])

    yield now
    guests.end()
    if host.store.find(ref, "system"):
        host.store.remove(ref)


def test_a_program_that_a_signal_starts_anew(
    host: Runtime, boot: Boot, python_root: Artifact, run_in: RunIn, save: SaveHooked
) -> None:
    guest = boot(python_root, memory=160 * MIB)
    write(run_in, guest, "/srv/app.py", APP)
    run_in(guest, "sh", "-c", "setsid python3 /srv/app.py >/dev/null 2>&1 &")
    assert run_in(guest, "sh", "-c", ASK_APP, timeout=600).exit_code == 0

    saved = save(guest)
    (found,) = [each for each in saved.generators if each.program.startswith("python3")]
    assert (found.secrets, found.source, found.covered) == (True, "libcrypto.so", "")
    assert alike(drawn(saved.artifact, ASK_APP)) == {"openssl", "python"}

    write(run_in, guest, "/etc/onecopy/clone.d/10-first", FIRST, mode="755")
    write(run_in, guest, "/etc/onecopy/clone.d/20-second", SECOND, mode="755")
    write(run_in, guest, "/etc/onecopy/clone.d/README", "no program\n")
    saved = save(guest, "signal:HUP:python3*", command="echo last >>/tmp/ran")
    (found,) = [each for each in saved.generators if each.program.startswith("python3")]
    assert found.covered == "signal:HUP:python3*"
    folder = "/etc/onecopy/clone.d"
    assert saved.clone_hooks == (found.covered, f"{folder}/10-first", f"{folder}/20-second")
    script = ASK_APP + "echo ran $(cat /tmp/ran)\n"
    pair = drawn(saved.artifact, script, name="own")
    assert [each.pop("ran") for each in pair] == [{"1 own-1 2 last"}, {"1 own-2 2 last"}]
    assert not alike(pair)

    # What cannot be is refused at the save, and what fails in a clone is told by its name.
    for hook, why in (
        ("redis", "does not run"),
        ("restart:python3.11", "systemd does not run"),
        ("signal:NONE:python3*", "no signal"),
    ):
        with pytest.raises(InvalidInput, match=why):
            save(guest, hook)
    run_in(guest, "touch", "/tmp/bad")
    saved = save(guest, "none")
    with pytest.raises(AgentFailed, match="20-second: exit code 4: no luck"):
        drawn(saved.artifact, ASK_APP)


#: A pool of one connection to redis, which is asked all the time; each answer leaves the time.
POOL = """\
import socket, time

def asked(connection):
    connection.sendall(b"PING\\r\\n")
    return connection.recv(64) == b"+PONG\\r\\n"

connection = None
while True:
    try:
        connection = connection or socket.create_connection(("127.0.0.1", 6379), 5)
        good = asked(connection)
    except OSError:
        good = False
    if not good:
        connection = None
    with open("/run/pool.log", "a") as log:
        print(time.monotonic(), "good" if good else "bad", file=log)
    time.sleep(0.1)
"""
#: Run in each clone of the user's systemd target.
UNIT = """\
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'hostname >>/run/target'
[Install]
WantedBy=onecopy-clone.target
"""
NGINX = 'server { listen 8081; location / { return 200 "$request_id $hostname\\n"; } }\n'
DRAW = f"""\
ask() {{ wget -qO- http://127.0.0.1:8081/; }}
{SETTLED} ask
for n in 1 2 3 4 5 6; do
    set -- $(ask)
    [ -z "$1" ] || printf 'nginx %s\nnamed %s\n' $1 $2
    echo redis $(redis-cli acl genpass)
done
echo sshd $(cut -d ' ' -f 2 /etc/ssh/ssh_host_ed25519_key.pub)
"""
#: How often the pool has asked since the hand-out until it had an answer.
POOLED = """\
since=$(cut -d ' ' -f 1 /proc/uptime)
tries=0
while [ $tries -lt 120 ]; do
    awk -v since=$since '$1 > since { n++ } $1 > since && $2 == "good" { print "pool", n; exit }' \\
        /run/pool.log | grep pool && break
    tries=$((tries + 1))
    sleep 0.5
done
echo target $(cat /run/target)
"""


def prepared(boot: Boot, root: Artifact, run_in: RunIn) -> GuestRecord:
    """A booted guest whose services have drawn something already."""
    guest = boot(root, memory=256 * MIB, timeout=600)
    write(run_in, guest, "/etc/nginx/conf.d/id.conf", NGINX)
    write(run_in, guest, "/srv/pool.py", POOL)
    write(run_in, guest, "/etc/systemd/system/own.service", UNIT)
    script = "systemctl reload nginx && systemd-run -q --unit pool python3 /srv/pool.py"
    assert run_in(guest, "sh", "-c", f"{script} && {DRAW}", timeout=600).exit_code == 0
    return guest


def test_services_of_systemd(host: Runtime, boot: Boot, run_in: RunIn, save: SaveHooked) -> None:
    root = build_segment(
        host.store, DAEMONS, "debian:trixie", BuildOptions(include=DAEMONS_PACKAGES)
    )
    guest = prepared(boot, root, run_in)
    saved = save(guest)
    found = {each.program: each for each in saved.generators}
    assert [found[name].hook for name in ("nginx", "redis-server")] == ["nginx", "redis"]
    assert found["sshd"].covered
    assert not any(name.startswith(("systemd", "udev")) for name in found)
    assert alike(drawn(saved.artifact, DRAW)) >= {"redis", "nginx"}

    assert run_in(guest, "systemctl", "enable", "own.service").exit_code == 0
    saved = save(guest, "auto", "openssh")
    assert saved.clone_hooks == ("nginx", "redis", "openssh", "own.service")
    covered = {each.program: each.covered for each in saved.generators}
    assert (covered["nginx"], covered["redis-server"]) == ("nginx", "redis")
    pair = drawn(saved.artifact, POOLED + DRAW, name="own")
    # At 10 tries a second, and on a host that has much else to do.
    assert all(int(tries) <= 10 for each in pair for tries in each.pop("pool"))
    assert [each.pop("target") for each in pair] == [{"own-1"}, {"own-2"}]
    assert not alike(pair)
