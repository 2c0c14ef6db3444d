"""Which QEMUs are forked: this host's, and programs in its place that cannot be."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from onecopy import subprocesses
from onecopy.linux.lock import locked_blocking
from onecopy.subprocesses import find_program
from onecopy.vmm import fork_probe, fork_registry, fork_server
from onecopy.vmm.fork_probe import Library
from onecopy.vmm.qemu import BINARY

#: Programs in QEMU's place: one that takes no library and waits, one that takes it and does not
#: serve.
STATIC = "#include <unistd.h>\nint main(void) { for (;;) pause(); }"
DYNAMIC = "int main(void) { return 0; }"


pytestmark = pytest.mark.usefixtures("base")


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory from which a VMM's user may start programs."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def compiled(folder: Path, text: str, *options: str) -> str:
    program = folder / "program"
    program.with_suffix(".c").write_text(text)
    subprocess.run(["gcc", *options, "-o", program, program.with_suffix(".c")], check=True)
    return str(program)


def processes_of(binary: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[1-9]*/exe"):
        try:
            if str(path.readlink()) == binary:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_this_host_s_qemu_is_forked(tmp_path: Path, base: Path) -> None:
    found = fork_probe.find(find_program(BINARY), tmp_path)
    assert found.path and not found.why_not
    assert list((base / "forks").iterdir()) == []


def test_a_probe_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = find_program(BINARY)
    first = fork_probe.find(binary, tmp_path)
    monkeypatch.setattr(fork_probe, "_probe", lambda *_: "not probed")
    assert fork_probe.find(binary, tmp_path) == first


def test_a_failed_probe_is_kept_unless_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ["it hangs", "it still hangs", ""]
    monkeypatch.setattr(fork_probe, "_probe", lambda *_: results.pop(0))
    failed = Library(None, "it hangs; `onecopy doctor` tries again")
    assert [fork_probe.find("/bin/true", tmp_path) for _ in range(2)] == [failed] * 2
    assert "still" in fork_probe.find("/bin/true", tmp_path, again=0).why_not
    assert fork_probe.find("/bin/true", tmp_path, again=0).path
    assert fork_probe.find("/bin/true", tmp_path).path


def test_another_program_is_not_forked(tmp_path: Path, public: Path) -> None:
    binary = compiled(public, DYNAMIC)
    found = fork_probe.find(binary, tmp_path)
    assert not found.path
    assert "cannot be forked: the fork server ended while starting" in found.why_not


def test_a_program_that_hangs_is_ended(
    tmp_path: Path, public: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = compiled(public, STATIC, "-static")
    monkeypatch.setattr(fork_server, "_PATIENCE", 0.5)
    found = fork_probe.find(binary, tmp_path)
    assert not found.path
    assert "did not start" in found.why_not
    assert processes_of(binary) == []
    fork_registry.sweep()
    assert list((base / "forks").iterdir()) == []
    # Later starts do not wait for it.
    monkeypatch.setattr(fork_server, "_PATIENCE", 1e6)
    assert fork_probe.find(binary, tmp_path) == found


def test_without_a_compiler_a_shipped_library_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fork_server.library(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    binary = find_program(BINARY)
    monkeypatch.setattr(subprocesses, "_PATH", str(empty))
    monkeypatch.setattr(fork_server, "_SHIPPED", tmp_path / "missing")
    found = fork_probe.find(binary, empty)
    assert not found.path
    assert "gcc is not installed" in found.why_not
    assert "apt-get install gcc libc6-dev" in found.why_not
    monkeypatch.setattr(fork_server, "_SHIPPED", made)
    assert fork_probe.find(binary, empty) == Library(made)


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_COMPILE", ("-include", "no-such-header.h"))
    found = fork_probe.find(find_program(BINARY), tmp_path)
    assert "gcc cannot compile" in found.why_not
    assert len(found.why_not) < 200


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    found = fork_probe.find(find_program(BINARY), tmp_path / "missing")
    assert found.why_not.endswith("No such file or directory")


def test_what_ended_servers_left_is_swept() -> None:
    forks = fork_registry.directory()
    with subprocess.Popen(["sleep", "1000"]) as process:
        for key in ("0a", "0b"):
            (forks / key).touch()
            (forks / f"{key}.lock").touch()
            fork_registry.record(forks / key, process.pid, "store", "blue")
        one = fork_registry.running()[0]
        assert (one.process.pid, one.domain) == (process.pid, "blue")
        fork_registry.sweep()
        assert len(list(forks.iterdir())) == 6
        # Its command was killed while it wrote.
        (forks / f"0b={process.pid}-{one.process.start_ticks}").write_text("")
        assert len(fork_registry.running()) == 1
        fork_registry.sweep()
        assert len(list(forks.iterdir())) == 6
        process.kill()
    fork_registry.sweep()
    assert list(forks.iterdir()) == []
    assert fork_registry.running() == []


def test_a_server_that_is_being_started_is_not_swept(base: Path) -> None:
    socket = fork_registry.directory() / "0a"
    with locked_blocking(fork_registry.lock_of(socket)):
        socket.touch()
        fork_registry.sweep()
        assert socket.exists()
    # Its command was killed before it knew the process.
    fork_registry.sweep()
    assert list(base.joinpath("forks").iterdir()) == []
