"""A host of the test's own, as far as its network goes: addresses, services, name server, outside.

It is a pair of network namespaces with a mount namespace, so that nothing of this machine's network
is touched, and commands that run in it find another /etc/resolv.conf. What listens there answers
its own name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onecopy
from onecopy.errors import CommandFailed
from tests.conftest import cannot_run
from tests.unit.other_user import NOBODY

#: The host's own address, and what listens outside of it.
HOST, OUTSIDE = "10.213.48.1", "10.213.48.2"
RESOLVER = "127.0.0.53"
METADATA = "169.254.169.254"
#: Where everything listens, by TCP and UDP.
PORT = 7001

_HOST_NET = f"""
    set -e
    mount --make-rprivate /
    mount --bind "$1/resolv.conf" /etc/resolv.conf
    # What other users reach, too: this Python, what it runs, and tap devices.
    for each in python:"$3" code:"$4" site:"$5"; do
        mkdir "$1/${{each%%:*}}"
        mount --bind "${{each#*:}}" "$1/${{each%%:*}}"
    done
    if [ -n "$6" ]; then
        mount -t tmpfs -o mode=755 none "$6"
        mkdir -p "$3"
        mount --bind "$1/python" "$3"
    fi
    mknod -m 666 "$1/tun" c 10 200
    mount --bind "$1/tun" /dev/net/tun
    ip link set lo up
    ip link add octest0 type veth peer name octest1 netns "$2"
    ip addr add {HOST}/24 dev octest0
    ip link set octest0 up
    nsenter --net=/proc/"$2"/ns/net sh -c '
        ip link set lo up
        ip addr add {OUTSIDE}/24 dev octest1
        ip addr add {METADATA}/32 dev lo
        ip link set octest1 up
        ip route add default via {HOST}'
    ip route add default via {OUTSIDE}
"""
#: Answers its first argument at PORT and 80 by TCP, at PORT and 53 by UDP.
_SERVE = """
    import selectors, socket, sys
    word, ready = sys.argv[1].encode(), selectors.DefaultSelector()
    for port in map(int, sys.argv[2].split(",")):
        ready.register(socket.create_server(("0.0.0.0", port)), selectors.EVENT_READ)
    for port in map(int, sys.argv[3].split(",")):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO: answers come from where it was asked
        udp.bind(("0.0.0.0", port))
        ready.register(udp, selectors.EVENT_READ)
    print("up", flush=True)
    while True:
        for key, _ in ready.select():
            try:
                if key.fileobj.type == socket.SOCK_STREAM:
                    client, _ = key.fileobj.accept()
                    client.sendall(word)
                    client.close()
                else:
                    _, ((_, _, info),), _, whom = key.fileobj.recvmsg(2000, 100)
                    answer = [(socket.IPPROTO_IP, 8, bytes(4) + info[8:] + bytes(4))]
                    key.fileobj.sendmsg([word], answer, 0, whom)
            except OSError:
                pass
"""


class World:
    """The namespaces, by the processes that keep them."""

    def __init__(self, folder: Path, host: int, outside: int) -> None:
        self.folder, self.host, self.outside = folder, host, outside

    def inside(self, *argv: str) -> list[str]:
        """A command line that runs on the host of the test's own."""
        return _enter(self.host, "net", "mnt") + list(argv)

    def onecopy(self, *arguments: str, home: Path | None = None, before: Sequence[str] = ()) -> str:
        """What a command of ours prints there, which ``before`` starts; raise CommandFailed.

        With ``home``, which has a store and is of an ordinary user, it is that user's.
        """
        if home is None:
            return self.run(*before, sys.executable, "-m", "onecopy", *arguments)
        environment = {
            "HOME": home,
            "ONECOPY_HOME": home / "store",
            "XDG_RUNTIME_DIR": home / "run",
            "PYTHONPATH": f"{self.folder}/code:{self.folder}/site",
        }
        user = f"--reuid={NOBODY} --regid={NOBODY} --clear-groups --inh-caps=-all".split()
        given = [f"{key}={value}" for key, value in environment.items()]
        line = ["env", "--chdir=/", *given, f"{sys.base_prefix}/bin/python3", "-m", "onecopy"]
        return self.run(*before, "setpriv", *user, *line, *arguments)

    def run(self, *argv: str) -> str:
        """What a program prints there; raise CommandFailed."""
        done = subprocess.run(self.inside(*argv), capture_output=True, text=True)
        if done.returncode:
            raise CommandFailed(" ".join(argv), done.returncode, done.stderr)
        return done.stdout


@contextmanager
def world() -> Iterator[World]:
    """A host that has an address, services on all addresses, a name server, and an outside."""
    if os.geteuid() != 0:
        cannot_run("only root makes network namespaces with a way from one to the other")
    with (
        tempfile.TemporaryDirectory(prefix="onecopy-world-") as name,
        _kept(["unshare", "--net", "--mount"]) as host,
        _kept(["unshare", "--net"]) as outside,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "resolv.conf").write_text(f"nameserver {RESOLVER}\n")
        setup = ["sh", "-ec", _HOST_NET, "sh", name, str(outside), sys.base_prefix]
        setup += [str(Path(onecopy.__file__).parents[1]), sysconfig.get_path("purelib")]
        above = reversed(Path(sys.base_prefix).parents)
        setup.append(str(next((each for each in above if not each.stat().st_mode & 1), "")))
        made = subprocess.run(_enter(host, "net", "mnt") + setup, capture_output=True, text=True)
        if made.returncode:
            cannot_run(f"no network of the test's own can be made: {made.stderr}")
        here = World(folder, host, outside)
        serve = [sys.executable, "-c", textwrap.dedent(_SERVE)]
        ports = [f"{PORT},80", f"{PORT},53"]
        with (
            _serving([*here.inside(*serve), "host", *ports]),
            _serving([*_enter(outside, "net"), *serve, "outside", *ports]),
        ):
            yield here


def _enter(pid: int, *kinds: str) -> list[str]:
    names = {"net": "--net", "mnt": "--mount"}
    return ["nsenter", *(f"{names[kind]}=/proc/{pid}/ns/{kind}" for kind in kinds), "--"]


@contextmanager
def _kept(unshare: Sequence[str]) -> Iterator[int]:
    """A process in new namespaces that does nothing."""
    before = Path("/proc/self/ns/net").readlink()
    with subprocess.Popen([*unshare, "sleep", "infinity"]) as process:
        try:
            while Path(f"/proc/{process.pid}/ns/net").readlink() == before:
                time.sleep(0.01)
            yield process.pid
        finally:
            process.kill()


@contextmanager
def _serving(argv: Sequence[str]) -> Iterator[None]:
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
            yield
        finally:
            process.kill()
