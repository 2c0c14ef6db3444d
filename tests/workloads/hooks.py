"""Ready clone hooks of services that start slowly: PostgreSQL, node, Java, PHP-FPM, RabbitMQ.

It runs only by its name (`pytest tests/workloads/hooks.py`), because building and booting take
minutes. All services run in one guest, which is saved without hooks and with all of them. Not here:
nginx, OpenSSH and redis (tests/vm/test_hooks.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onecopy.guest.lifecycle.save import Saved
from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.images.build import BuildOptions, build_segment
from onecopy.model import MIB, Reference
from tests.hooks_kit import SETTLED, alike, drawn, write
from tests.vm.conftest import Boot, RunIn
from tests.vm.guests import Guests

ROOT = Reference("hooks", "trixie")
PACKAGES = (
    *("systemd-sysv", "dbus", "nginx", "postgresql", "nodejs", "default-jdk-headless"),
    *("php-fpm", "rabbitmq-server", "python3"),
)
SAVED = Reference("services-hooked")

NODE = """\
const crypto = require("crypto");
const draw = () => [crypto.randomBytes(8).toString("hex"), crypto.randomUUID(), Math.random(),
    crypto.generateKeyPairSync("ed25519").publicKey.export({type: "spki", format: "der"})
        .toString("hex")].join(" ");
draw();
require("http").createServer((_, answer) => answer.end(draw() + "\\n")).listen(8002, "127.0.0.1");
"""
JAVA = """\
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.security.SecureRandom;

public class App {
    public static void main(String[] args) throws Exception {
        SecureRandom drbg = SecureRandom.getInstance("DRBG"), usual = new SecureRandom();
        drbg.nextLong();
        usual.nextLong();
        Math.random();
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 8003), 0);
        server.createContext("/", exchange -> {
            byte[] said = (drbg.nextLong() + " " + Math.random() + " " + usual.nextLong() + "\\n")
                .getBytes();
            exchange.sendResponseHeaders(200, said.length);
            exchange.getResponseBody().write(said);
            exchange.close();
        });
        server.start();
    }
}
"""
PHP = """\
<?php mt_rand();
echo mt_rand(), " ", bin2hex(openssl_random_pseudo_bytes(8)), " ", bin2hex(random_bytes(8)), "\\n";
"""
NGINX = """\
server {
    listen 127.0.0.1:8001;
    location / {
        include fastcgi_params;
        fastcgi_param SCRIPT_FILENAME /srv/draw.php;
        fastcgi_pass unix:/run/php/php8.4-fpm.sock;
    }
}
"""
#: A pool of one connection to PostgreSQL. To each request it answers how often it had to ask, ten
#: times a second, and what the server has drawn. A connection that ended is made anew.
POOL = """\
import http.server, subprocess, time

class Pool(http.server.BaseHTTPRequestHandler):
    server = None

    def ask(self):
        argv = ["psql", "-X", "-q", "-A", "-t"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            Pool.server = Pool.server or subprocess.Popen(argv, text=True, bufsize=1, **pipes)
            Pool.server.stdin.write("select random(), gen_random_uuid();\\n")
            said = Pool.server.stdout.readline().strip()
        except BrokenPipeError:
            said = ""
        if not said:
            Pool.server.kill()
            Pool.server.wait()
            Pool.server = None
        return said

    def do_GET(self):
        for tries in range(1, 1000):
            said = self.ask()
            if said:
                break
            time.sleep(0.1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{tries} {said}\\n".encode())

    def log_message(self, *args):
        pass

http.server.HTTPServer(("127.0.0.1", 8004), Pool).serve_forever()
"""
UNITS = {
    "node-app": "ExecStart=/usr/bin/node /srv/app.js",
    "java-app": "ExecStart=/usr/bin/java -Xmx64m -XX:+UseSerialGC /srv/App.java",
    "pool": "User=postgres\nExecStart=/usr/bin/python3 /srv/pool.py",
}
SET_UP = """\
set -e
for pool in /etc/php/*/fpm/pool.d/www.conf; do
    sed -i 's/^pm = .*/pm = static/; s/^pm.max_children = .*/pm.max_children = 1/' $pool
done
systemctl daemon-reload
systemctl restart php8.4-fpm nginx rabbitmq-server
systemctl start node-app java-app pool
"""
#: "NAME VALUE": what each service draws, and the names that it has.
DRAW = f"""\
web() {{ wget -qO- http://127.0.0.1:$1/; }}
set -- $(web 8004)
echo pool-tries $1
{SETTLED} web 8001
{SETTLED} web 8002
{SETTLED} web 8003
for n in 1 2 3 4 5 6; do
    set -- $(web 8001)
    [ -z "$1" ] || printf 'php-mt_rand %s\nphp-openssl %s\nphp-kernel %s\n' $1 $2 $3
    set -- $(web 8002)
    [ -z "$1" ] || printf 'node-bytes %s\nnode-uuid %s\nnode-number %s\nnode-key %s\n' $*
    set -- $(web 8003)
    [ -z "$1" ] || printf 'java-drbg %s\njava-number %s\njava-kernel %s\n' $1 $2 $3
    set -- $(web 8004)
    [ -z "$2" ] || echo postgresql $2
done
echo rabbitmq-cookie $(md5sum </var/lib/rabbitmq/.erlang.cookie)
echo rabbitmq-up $(rabbitmqctl -q await_startup && echo yes)
echo rabbitmq-cluster $(rabbitmqctl -q eval 'rabbit_nodes:cluster_name().')
"""
#: Drawn from generators of programs that go on. PHP seeds mt_rand for each request.
OWN = {
    *("php-openssl", "node-bytes", "node-uuid", "node-number", "node-key"),
    *("java-drbg", "java-number", "postgresql", "rabbitmq-cookie"),
}


@pytest.fixture
def guest(host: Runtime, boot: Boot, run_in: RunIn) -> GuestRecord:
    """A booted guest with all services, which have drawn something already."""
    root = host.store.find(ROOT, "segment")
    if not root:
        root = build_segment(
            host.store, ROOT, f"debian:{ROOT.version}", BuildOptions(include=PACKAGES)
        )
    guest = boot(root, memory=1024 * MIB, timeout=1800)
    write(run_in, guest, "/srv/app.js", NODE)
    write(run_in, guest, "/srv/App.java", JAVA)
    write(run_in, guest, "/srv/draw.php", PHP)
    write(run_in, guest, "/srv/pool.py", POOL)
    write(run_in, guest, "/etc/nginx/conf.d/draw.conf", NGINX)
    write(run_in, guest, "/etc/rabbitmq/rabbitmq-env.conf", "NODENAME=rabbit@localhost\n")
    for name, lines in UNITS.items():
        write(run_in, guest, f"/etc/systemd/system/{name}.service", f"[Service]\n{lines}\n")
    for script in (SET_UP + f"web() {{ wget -qO- http://127.0.0.1:8004; }}\n{SETTLED} web", DRAW):
        done = run_in(guest, "sh", "-c", script, timeout=1800)
        assert done.exit_code == 0, done
    return guest


@pytest.fixture
def save(host: Runtime, guests: Guests, guest: GuestRecord) -> Iterator[dict[str, Saved]]:
    """What came of saving the guest without hooks ("plain"), and then with them."""
    plain = guests.save(guest, f"{SAVED.name}-plain")
    hooked = guests.save(guest, SAVED, clone_hooks=("auto",))
    yield {"plain": plain, "hooked": hooked}
    for saved in (plain, hooked):
        host.store.remove(Reference.parse(saved.artifact.ref))


def test_alike_without_hooks_and_not_with_them(save: dict[str, Saved]) -> None:
    hooks = ("jvm", "nginx", "node", "php-fpm", "postgresql", "rabbitmq")
    assert save["hooked"].clone_hooks == hooks
    same = alike(drawn(save["plain"].artifact, DRAW))
    assert same >= OWN
    assert not {"php-kernel", "java-kernel"} & same

    pair = drawn(save["hooked"].artifact, DRAW, name="own")
    for number, each in enumerate(pair, 1):
        assert each.pop("rabbitmq-up") == {"yes"}
        # Ten tries a second.
        assert all(int(tries) <= 10 for tries in each.pop("pool-tries"))
        assert f"own-{number}" in "".join(each.pop("rabbitmq-cluster"))
    assert not alike(pair)
