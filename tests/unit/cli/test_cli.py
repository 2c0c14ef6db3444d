"""The command line as users meet it: helps, refusals with a hint, exit codes, completion.

Not here: what commands do with guests (tests/vm), JSON fields (test_json.py).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onecopy import cli
from onecopy.errors import InvalidInput
from onecopy.guest.run_directory import run_root
from onecopy.store import Store
from tests.unit.store_kit import put

_SCRIPT = "import sys; from onecopy.cli import main; sys.exit(main())"
_ARGV = [sys.executable, "-c", _SCRIPT]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store of our own; what main() changes in this process is put back."""
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / "home"))
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    store = Store()
    yield store
    for number, handler in before.items():
        signal.signal(number, handler)
    shutil.rmtree(run_root(store), ignore_errors=True)


def _onecopy(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*_ARGV, *args], env=env, capture_output=True, text=True, check=False)


def test_help_loads_no_more_than_it_needs() -> None:
    script = (
        "import sys; from onecopy.cli import main; assert main(['--help']) == 0;"
        "print({name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    help_, _, loaded = done.stdout.rstrip().rpartition("\n")
    assert all(name in help_ for name in cli.COMMANDS)
    assert "'click'" in loaded
    for heavy in ("rich", "msgspec", "asyncio", "qemu"):
        assert f"'{heavy}'" not in loaded


BAD = [
    "build Bad --from dir:/tmp",
    "build a@sha256:00 --from dir:/tmp",
    "build a --from /tmp",
    "build a --from dir:",
    "build a --from docker:x",
    "build a --from dir:/tmp --include python3",
    "build a --from dir:/tmp --fs xfs",
    "build a",
    "save -a --root b",
    "save a --root b:c:d",
    "save a --root b --memory 1.5G",
    "save a --root b --memory \u0661M",
    "save a --root b --segment :/data",
    "save a --root b --segment :/srv",
    "save a --root b --segment a/b:/srv",
    "save a --root b --cpus 0",
    "save a --root b --timeout 0",
    "save a --root b --accel xen",
    "save a",
    "run",
    "run --name Web a",
    "run --name a.b a",
    "run -n 0 a",
    "run -n 10001 a",
    "run -p http a",
    "run -p 80: a",
    "run -p -1:80 a",
    "run -p 65536:80 a",
    "run -p 8080:0 a",
    "run -p 1:2:3 a",
    "run -p \u00b2 a",
    "run -p 80:\u0663 a",
    "run --disk 1M --name a a",
    "run --disk 1G a",
    "run -n 2 --disk a.img a",
    "run --name a --disk 1G --disk 1G a",
    "run --timeout 300 a",
    "run a -n 2",
    "run a --name b",
    "exec a --timeout 3 true",
    "exec a --",
    "boot",
    "boot --count 0 a",
    "boot --disk 1G a",
    "boot --memory x a",
    "save a --from b --memory 1G",
    "save a --from b --dry-run",
    "save a --root b --clone-hook command:x --clone-hook command:y",
    "save a --root b --clone-hook nonsense",
    "ls --format {{name}}",
    "ls --format nonsense",
    "ls --filter kind",
    "ls --filter nonsense=1",
    "ps --json --quiet",
    "disks --format name --quiet",
    "run --segment :/srv a",
    "run --cpus 0 a",
    "run --memory x a",
    "disks extra",
    "disks --rm A",
    "run --no-network a",
    "run --command true a",
    "run --ready true a",
    "run --no-such-option a",
    "cp a b",
    "cp a:/x b:/y",
    "cp a:/x",
    "cp ./a:b c",
    "stop",
    "stop a --all",
    "inspect A",
    "inspect a@sha256:XY",
    "verify",
    "rm",
    "rm a:",
    "ls --kind disk",
    "ps extra",
    "completion tcsh",
    "no-such-command",
]


@pytest.mark.parametrize("line", BAD)
def test_bad_input(line: str, home: Store, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split(" ")) == (125 if line.startswith("exec") else 2)
    out, err = capfd.readouterr()
    assert out == ""
    what, hint = err.splitlines()
    assert what.startswith("onecopy: ")
    assert hint.startswith("hint: ")
    assert len(hint) > len("hint: ") + 5
    assert "Traceback" not in err
    # Refused before anything was begun.
    assert home.artifacts() == []
    assert list((home.root / "tmp").iterdir()) == []


def test_ports_of_several_guests() -> None:
    from onecopy.guest.ports import numbered

    assert numbered(((8080, 80), (0, 443)), 2) == ((8082, 80), (0, 443))
    assert numbered(((65535, 80),), 0) == ((65535, 80),)
    with pytest.raises(InvalidInput):
        numbered(((65535, 80),), 1)


def test_exec_fails_in_one_way_behind_options_of_onecopy(tmp_path: Path) -> None:
    done = _onecopy("--debug", "exec", "nobody", "true", ONECOPY_HOME=str(tmp_path / "home"))
    assert done.returncode == cli.PASSED_FAILURE, done


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("inspect nothing", 3),
        ("logs nobody", 3),
        ("logs ../../etc", 3),
        ("run nothing", 3),
        ("build a --from dir:/no/such/folder", 8),
        ("exec nobody true", 125),
        ("exec", 125),
        ("ls", 0),
        ("ps", 0),
        ("stop --all", 0),
        ("--version", 0),
        ("run --help", 0),
    ],
)
def test_exit_codes(line: str, code: int, home: Store) -> None:
    assert cli.main(line.split(" ")) == code


def test_only_errors_go_to_standard_error(home: Store) -> None:
    good, bad = _onecopy("ls"), _onecopy("inspect", "nothing")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("NAME")
    assert (bad.returncode, bad.stdout) == (3, "")


def test_a_reader_that_leaves_is_told_nothing(home: Store) -> None:
    put(home)
    command = f'"$0" -c "{_SCRIPT}" inspect app:1 | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, check=True)
    assert done.stdout in (b"0\n", b"141\n")
    assert done.stderr == b""


@contextmanager
def _waiting(
    home: Store, source: Path, *ignored: signal.Signals
) -> Iterator[subprocess.Popen[str]]:
    """A command that waits, for the store's lock, as long as we like; and ignores signals."""
    source.mkdir()
    argv = [*_ARGV, "build", "a", "--from", f"dir:{source}"]
    traps = "".join(f"trap '' {number.name[3:]}; " for number in ignored)
    with home._layout.locked():
        shell = ["bash", "-c", f'{traps}exec "$@"', "bash"]
        command = subprocess.Popen([*shell, *argv], stderr=subprocess.PIPE, text=True)
        _wait_for_lock(command)
        yield command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_long_command(home: Store, number: signal.Signals, tmp_path: Path) -> None:
    with _waiting(home, tmp_path / "source") as command:
        command.send_signal(number)
        _, err = command.communicate(timeout=60)
    assert (command.returncode, err.strip()) == (130, "onecopy: interrupted")
    assert list((home.root / "tmp").iterdir()) == []


def test_a_background_job_ends_by_sigterm(home: Store, tmp_path: Path) -> None:
    # A shell without job control starts it with SIGINT ignored.
    with _waiting(home, tmp_path / "source", signal.SIGINT) as command:
        command.send_signal(signal.SIGTERM)
        _, err = command.communicate(timeout=60)
    assert (command.returncode, err.strip()) == (130, "onecopy: interrupted")


def test_nohup_survives_the_hangup(home: Store, tmp_path: Path) -> None:
    with _waiting(home, tmp_path / "source", signal.SIGHUP) as command:
        command.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(1)
        command.kill()
        command.communicate()


def _wait_for_lock(process: subprocess.Popen[str]) -> None:
    """proc_locks(5): "->" marks who waits."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for line in Path("/proc/locks").read_text().splitlines():
            if "->" in line and f" {process.pid} " in line:
                return
        time.sleep(0.01)
    raise AssertionError(f"it does not wait: {process.poll()}")


def test_rm_and_verify_really_do(home: Store) -> None:
    put(home, "app:1")
    put(home, "app:2", b"other")
    assert json.loads(_onecopy("inspect", "app:1").stdout)["version"] == "1"
    assert _onecopy("verify", "app:1").stdout == "app:1 is whole\n"
    blob = home.artifacts()[1].layers[0].path
    blob.chmod(0o600)
    blob.write_bytes(b"damaged")
    damaged = _onecopy("verify", "app:2")
    assert (damaged.returncode, damaged.stdout) == (14, "")
    assert _onecopy("rm", "app:1", "app:2").stdout == "app:1 removed\napp:2 removed\n"
    assert home.artifacts() == []
