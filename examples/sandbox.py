"""Run a Python program that nobody trusts: in a guest of its own, for 10 seconds at most."""

import sys

import onecopy


def run(code: bytes) -> onecopy.Completed:
    with onecopy.Host() as host, host.start("sandbox") as [guest]:
        return guest.exec(["python3", "-"], stdin=code, check=False, timeout=10)


done = run(sys.stdin.buffer.read())
print(done.text, end="")
print(done.stderr.decode(errors="replace"), end="", file=sys.stderr)
sys.exit(done.exit_code)
