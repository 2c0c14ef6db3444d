"""What a guest runs in place of QEMU's agent: it answers what it is told to, and lies.

It runs in the guest, alone (`python3 -c`), and has no more than Python. It takes the agent's port
over and then obeys "lie", whose argument is the mode from then on: a list of pairs of a command and
the raw answer to it; a command "" stands for all others. Answers that no JSON can be are made of
these words:

    {"raw": TEXT, "times": N, "then": TEXT}  TEXT (in base64) N times, then the other
    {"flood": TEXT}        TEXT again and again until the host says something
    {"silent": true}       nothing
    {"run": "WORDS"}       what an honest agent would answer, having started what it was asked to
    {"ports": KIND}        the same, but what it does to the ports of the program is hostile

Syncs are answered as they should be, unless the mode has an answer to them.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

AGENT = "org.onecopy.agent.0"


def device(name: str) -> str:
    while True:
        for path in Path("/sys/class/virtio-ports").iterdir():
            if (path / "name").exists() and (path / "name").read_text().strip() == name:
                return f"/dev/{path.name}"
        time.sleep(0.05)


def end_the_real_one() -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        # Killed, it would be started again by its twin.
        if b"/run/onecopy/tools/bin/keeper\0" in line:
            os.kill(int(path.parent.name), signal.SIGSTOP)
        elif b"bin/qemu-ga\0" in line:
            os.kill(int(path.parent.name), signal.SIGKILL)


def take_port() -> int:
    while True:
        end_the_real_one()
        try:
            return os.open(device(AGENT), os.O_RDWR)
        except OSError:
            time.sleep(0.1)


class Liar:
    def __init__(self, port: int) -> None:
        self.port = port
        self.mode: dict[str, Any] = {}
        self.held = b""
        self.children: dict[int, subprocess.Popen[bytes]] = {}

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.port, data) :]

    def serve(self) -> NoReturn:
        while True:
            while b"\n" not in self.held:
                data = os.read(self.port, 65536)
                if not data:
                    time.sleep(0.05)
                self.held += data
            line, _, self.held = self.held.partition(b"\n")
            line = line.rpartition(b"\xff")[2].strip()
            if line:
                self.answer(json.loads(line))

    def answer(self, request: dict[str, Any]) -> None:
        command, arguments = request["execute"], request.get("arguments", {})
        if command == "lie":
            self.mode = dict(arguments["mode"])
            self.write(b'{"return": {"liar": true}}\n')
        elif command == "guest-sync-delimited" and command not in self.mode:
            self.write(b'\xff{"return": %d}\n' % arguments["id"])
        else:
            self.lie(self.mode.get(command, self.mode.get("")), command, arguments)

    def lie(self, word: Any, command: str, arguments: Any) -> None:
        if word is None or "run" in word:
            self.honest(command, arguments)
        elif "ports" in word:
            self.on_ports(word["ports"], arguments)
        elif "raw" in word:
            text = base64.b64decode(word["raw"]) * word.get("times", 1)
            self.write(text + base64.b64decode(word.get("then", "")))
        elif "flood" in word:
            piece = base64.b64decode(word["flood"])
            piece *= max(1, 65536 // len(piece))
            while not select.select([self.port], [], [], 0)[0]:
                if select.select([], [self.port], [], 0.1)[1]:
                    os.write(self.port, piece[:4096])

    def honest(self, command: str, arguments: Any) -> None:
        value: Any = {}
        if command == "guest-exec":
            child = subprocess.Popen([arguments["path"], *arguments["arg"]])
            self.children[child.pid] = child
            value = {"pid": child.pid}
        elif command == "guest-exec-status":
            code = self.children[arguments["pid"]].wait()
            value = {"exited": True, "exitcode": code}
        elif command == "guest-file-open":
            value = 1000
        self.write(json.dumps({"return": value}).encode() + b"\n")

    def on_ports(self, kind: str, arguments: Any) -> None:
        """A wrapper of its own, instead of images/files/exec."""
        if arguments["arg"][0] == "kill":
            os.kill(-int(arguments["arg"][2][1:]), signal.SIGKILL)
            self.write(b'{"return": {"pid": 4}}\n')
            return
        tag = arguments["arg"][3]
        child = os.fork()
        if not child:
            os.setsid()
            err = os.open(device(tag + ".err"), os.O_WRONLY)
            out = os.open(device(tag + ".out"), os.O_WRONLY)
            if kind == "stderr":
                flood(err)
            if kind == "stdout":
                flood(out)
            if kind == "tag":
                os.write(out, b"all\0 \xff of it" + tag[:-1].encode() + b"#")
                os.write(err, tag[::-1].encode())
            os._exit(0)
        self.write(b'{"return": {"pid": %d}}\n' % child)
        if kind == "tag":
            os.waitpid(child, 0)


def flood(port: int) -> NoReturn:
    piece = b"\0\x1b[31m" * 10000
    while True:
        os.write(port, piece)


def main() -> None:
    if os.fork():
        sys.exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    # The real agent is still to tell that we have started.
    time.sleep(2)
    Liar(take_port()).serve()


if __name__ == "__main__":
    main()
