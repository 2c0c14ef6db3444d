"""Makes the compared guests: a Debian root with three applications; each guest runs one.

The guests share one root, or each has its own with the same packages. Not here: starting guests
(ways.py).
"""

from __future__ import annotations

import asyncio
import random
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib import resources
from itertools import cycle
from pathlib import Path

from msgspec.structs import replace

from benchmarks.setup import Setup, application, plan_clones
from onecopy.guest.lifecycle.launchplan import BootSpec
from onecopy.guest.lifecycle.save import save_system
from onecopy.guest.lifecycle.start import plan_launch
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.model import MIB, PAGE_SIZE, Reference
from onecopy.subprocesses import run
from onecopy.vmm.accel import Choice

Tell = Callable[[str], None]

_PREFIX = "script-compare-"
#: Kept in the store for the next run.
ROOT = Reference(f"{_PREFIX}root")
#: Source and packages of ROOT.
SOURCE = "debian:bookworm"
PACKAGES = ("busybox", "nginx-light", "python3", "redis-server")
RUNS = "Debian with Python, nginx or redis"
#: Ports of every guest: of the application, and of a shell.
PORT, SHELL = 80, 81
#: The content of redis: number of keys, and bytes of each value.
_KEYS, _VALUE = 16000, 1000

_SERVE_SHELL = rf"""
mkdir -p /run/shell/cgi-bin
cat >/run/shell/cgi-bin/run <<'END'
#!/bin/sh
printf 'Content-Type: text/plain\r\n\r\n'
eval "$(cat)" 2>&1
END
chmod 755 /run/shell/cgi-bin/run
busybox httpd -p {SHELL} -h /run/shell
"""
_NGINX = """
cat >/run/nginx.conf <<'END'
user www-data;
events {}
http { access_log off; server { listen 80; root /var/www/html; index index.nginx-debian.html; } }
END
exec nginx -c /run/nginx.conf -g 'daemon off;'
"""
_REDIS = f"""
redis-server --port {PORT} --bind 0.0.0.0 --protected-mode no --save '' --daemonize yes \
    --enable-debug-command yes
until redis-cli -p {PORT} DEBUG POPULATE {_KEYS} key {_VALUE}; do sleep 0.1; done
exec sleep infinity
"""
_REDIS_LOAD = f"redis-benchmark -p {PORT} -n 3000 -c 4 -t get --csv | tail -n 1 | cut -d '\"' -f 4"

#: Bytes of files unique to a root, if each guest has its own.
_OWN = 16 * MIB

_GET, _FOUND = b"GET / HTTP/1.0\r\n\r\n", b"200 OK"


@dataclass(frozen=True, slots=True)
class Application:
    """An application that serves at PORT, and a shell at SHELL."""

    name: str
    command: str
    """The command of the guest."""
    ready: str
    """A shell command in the guest that succeeds once the application serves."""
    asks: bytes
    """A request, and text that the first line of the answer contains."""
    answers: bytes
    load: str
    """A shell command in the guest that loads the application and prints answers per second."""


def _http_load(count: int) -> str:
    text = resources.files("benchmarks.compare").joinpath("load.py").read_text()
    return f"python3 -c {shlex.quote(text)} {PORT} {count}"


def _http(name: str, command: str, load: int) -> Application:
    ready = f"busybox wget -q -O /dev/null http://127.0.0.1:{PORT}/"
    return Application(name, _SERVE_SHELL + command, ready, _GET, _FOUND, _http_load(load))


def applications() -> list[Application]:
    """Return all applications, in the order in which guests get them."""
    ready = f"redis-cli -p {PORT} EXISTS key:{_KEYS - 1} | grep -q 1"
    last = f"EXISTS key:{_KEYS - 1}\r\n".encode()
    return [
        _http("python", application(), 100),
        _http("nginx", _NGINX, 500),
        Application("redis", _SERVE_SHELL + _REDIS, ready, last, b":1", _REDIS_LOAD),
    ]


@dataclass(frozen=True, slots=True)
class Ware:
    """An application, to be started in guests in any way."""

    name: str
    application: Application
    setup: Setup

    async def ask(self, port: int) -> None:
        """Ask the application once; raise OSError or ValueError if it does not answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(self.application.asks)
            line = await reader.readline()
        finally:
            writer.close()
        if self.application.answers not in line:
            raise ValueError(line)


def shell(port: int, command: str) -> str:
    """Run a command through the guest's shell port, and return its output; raise OSError."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", "/cgi-bin/run", command.encode())
        return connection.getresponse().read().decode()
    finally:
        connection.close()


@contextmanager
def removed_at_end(host: Runtime) -> Iterator[None]:
    """Remove everything but ROOT that a comparison has put into the store, in any case."""
    try:
        yield
    finally:
        for kind in ("system", "segment"):
            for each in host.store.artifacts(kind):
                if each.name.startswith(_PREFIX) and each.name != ROOT.name:
                    host.store.remove(Reference.parse(each.ref))


async def alike(host: Runtime, work: Path, accel: Choice, tell: Tell) -> list[Ware]:
    """Return one of each application, all on ROOT."""
    return [await _ware(host, work, accel, each, ROOT, tell) for each in applications()]


async def different(host: Runtime, work: Path, accel: Choice, count: int, tell: Tell) -> list[Ware]:
    """Return ``count``, each on its own root: the packages of ROOT, and unique files."""
    tree = work / "tree"
    image = host.store.resolve(ROOT, "segment").layer("image").path
    run(["fsck.erofs", f"--extract={tree}", image])
    try:
        roots = [_own_root(host, tree, number, tell) for number in range(count)]
    finally:
        shutil.rmtree(tree)
    each = zip(cycle(applications()), roots, strict=False)
    return [await _ware(host, work, accel, application, root, tell) for application, root in each]


def build_root(host: Runtime, tree: Path | None, tell: Tell) -> None:
    """Build ROOT, unless it is there: from a directory that has the packages, or from Debian."""
    if host.store.find(ROOT, "segment") is None:
        source, packages = (f"dir:{tree}", ()) if tree else (SOURCE, PACKAGES)
        build_segment(host.store, ROOT, source, BuildOptions(include=packages), progress=tell)


def _own_root(host: Runtime, tree: Path, number: int, tell: Tell) -> Reference:
    """Put unique files first in the image, so that other files have different offsets in each."""
    root = Reference(f"{_PREFIX}root-{number}")
    own = tree / "0" / "own"
    own.parent.mkdir(exist_ok=True)
    own.write_bytes(random.Random(number).randbytes(_OWN + number * PAGE_SIZE))  # noqa: S311
    build_segment(host.store, root, f"dir:{tree}", progress=tell)
    return root


async def _ware(
    host: Runtime, work: Path, accel: Choice, each: Application, root: Reference, tell: Tell
) -> Ware:
    name = each.name if root == ROOT else f"{each.name}-{root.name.rpartition('-')[2]}"
    spec = BootSpec(root=root, command=each.command, ready=each.ready, accel=accel)
    began = time.monotonic()
    artifact = (await save_system(host, Reference(f"{_PREFIX}{name}"), spec, tell)).artifact
    setup = Setup(
        host=host,
        spec=spec,
        prepared=plan_launch(host, replace(spec, ready=None), tell),
        saved=plan_clones(host, artifact),
        work=work,
        save_seconds=time.monotonic() - began,
    )
    return Ware(name, each, setup)
