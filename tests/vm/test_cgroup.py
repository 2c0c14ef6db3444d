"""Control groups limit a real process, in a guest whose kernel has version 2 only.

The test host may have no control groups. The guest runs linux/cgroup.py unchanged, with the
standard library of its Python.
"""

from __future__ import annotations

from pathlib import Path

from onecopy.linux import cgroup
from tests.vm.conftest import Clones, RunIn

TRY = """\
import os, subprocess, sys
namespace = {"__name__": "cgroup"}
exec(compile(sys.stdin.read(), "cgroup.py", "exec"), namespace)
create, sweep, processes = (namespace[name] for name in ("create", "sweep", "processes"))
raise_memory_limit, of = (namespace[name] for name in ("raise_memory_limit", "of"))
why_not = namespace["why_not"]
assert why_not() == "", why_not()

def child(program):
    return subprocess.Popen([sys.executable, "-c", "input();" + program], stdin=subprocess.PIPE)

def go(process):
    process.communicate(b"\\n")
    return process.returncode

# More memory than it may have: the kernel ends it, and nobody else.
greedy = child("bytearray(48 << 20)")
group = create(greedy.pid, 24 << 20, 10)
assert group and of(greedy.pid) == group and processes() == {greedy.pid: group}
print("greedy", go(greedy))
# Room that came later.
modest = child("bytearray(48 << 20)")
create(modest.pid, 24 << 20, 10)
raise_memory_limit(modest.pid, 56 << 20)
print("modest", go(modest))
# More threads than it may have.
many = child('''
import threading
try:
    for count in range(100):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
except RuntimeError:
    print("threads", count, flush=True)
''')
create(many.pid, 64 << 20, 10)
go(many)
alive = child("")
kept = create(alive.pid, 64 << 20, 10)
sweep()
print("left", [str(each) for each in kept.parent.iterdir() if each.is_dir()] == [str(kept)])
go(alive)
sweep()
print("left", any(each.is_dir() for each in kept.parent.iterdir()))
"""


def test_a_process_in_a_group_of_ours(clones: Clones, run_in: RunIn) -> None:
    (guest,) = clones(1)
    module = Path(cgroup.__file__).read_bytes()
    done = run_in(guest, "python3", "-u", "-c", TRY, stdin=module)
    assert done.exit_code == 0, done.stderr.decode()
    # Itself, and nine more.
    expected = ["greedy -9", "modest 0", "threads 9", "left True", "left False"]
    assert done.stdout.decode().splitlines() == expected
