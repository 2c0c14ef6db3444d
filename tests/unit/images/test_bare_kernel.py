"""Kernels by themselves: what is one, and what nobody can do to a bare machine."""

import asyncio
from pathlib import Path

import pytest

from onecopy.cli import main
from onecopy.errors import AgentFailed, BadSource, InvalidInput
from onecopy.guest.run_directory import RunDirectory
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.attach import attach, detach
from onecopy.guest.segments.commit import commit
from onecopy.images.build import BuildOptions, build_segment
from onecopy.images.kernel import KernelConfig
from onecopy.model import PageClass, Reference
from onecopy.store import Store
from onecopy.vmm.agent import Agent
from tests.unit.guest_kit import record


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(bytes(0x202) + b"HdrS" + bytes(1000))
    return path


def test_a_kernel_is_taken_in(tmp_path: Path, kernel: Path) -> None:
    store = Store(tmp_path / "store")
    first = build_segment(store, Reference("bare"), f"kernel:{kernel}")
    again = build_segment(store, Reference("again"), f"kernel:{kernel}")
    assert (first.kind, first.digest) == ("kernel", again.digest)
    assert KernelConfig.of(first).bare
    assert first.layer("kernel").path.read_bytes() == kernel.read_bytes()


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("kernel:", InvalidInput, "no file name"),
        ("kernel:{}/missing", BadSource, "No such file"),
        ("kernel:{}", BadSource, "Is a directory"),
        ("kernel:{}/text", BadSource, "not a kernel"),
    ],
)
def test_what_is_no_kernel(
    tmp_path: Path, text: str, error: type[BadSource | InvalidInput], said: str
) -> None:
    (tmp_path / "text").write_text("text")
    store = Store(tmp_path / "store")
    with pytest.raises(error, match=said) as caught:
        build_segment(store, Reference("bare"), text.format(tmp_path))
    assert caught.value.hint
    assert not store.artifacts()


def test_a_kernel_is_no_file_system(tmp_path: Path, kernel: Path) -> None:
    for options in ({"include": ["x"]}, {"fs": "ext2"}, {"page_class": PageClass.EW}, {"room": 1}):
        with pytest.raises(InvalidInput, match="no packages"):
            build_segment(
                Store(tmp_path / "store"),
                Reference("b"),
                f"kernel:{kernel}",
                BuildOptions(**options),
            )


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A host with the record of a bare machine; whoever calls its agent fails."""
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / "store"))
    store = Store()
    host = Runtime(store, tmp_path / "run")
    (host.run / "bare").mkdir(parents=True)
    RunDirectory(host.run / "bare").write(record("bare", kind="booted", agent=False))

    async def call(*_: object, **__: object) -> None:
        pytest.fail("the agent was called")

    monkeypatch.setattr(Agent, "call", call)
    monkeypatch.setattr(Runtime, "open", lambda: host)
    return host


def test_what_needs_an_agent_is_refused_at_once(
    bare: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = Reference("segment")
    for work in (
        attach(bare, "bare", ref),
        detach(bare, "bare", "segment"),
        commit(bare, "bare", "segment"),
    ):
        with pytest.raises(AgentFailed, match="bare is a bare machine") as caught:
            asyncio.run(work)
        assert "console" in caught.value.hint
    assert main(["exec", "bare", "true"]) == 125
    assert "bare is a bare machine" in capsys.readouterr().err
