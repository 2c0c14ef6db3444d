"""Pages that VMMs of a fork server have in common although each has written them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from onecopy.linux.counters import pagemap, smaps
from onecopy.linux.counters.smaps import Mapping
from onecopy.model import PAGE_SIZE
from onecopy.vmm import fork_registry
from onecopy.vmm.fork_server import ForkServer
from tests.conftest import cannot_run
from tests.unit.vmm.fork_kit import Vmm, vmm

NAME = "/memfd:onecopy-template (deleted)"
#: Three tables of 152 KiB, and what makes QEMU wait.
DEVICES = ("-device", "virtio-serial-pci") * 3
WAITING = (*DEVICES, "-incoming", "defer")
#: The number of the first template in a server (files/fork_template.c), and all seals (fcntl(2)).
FIRST, SEALS = 4016, 0xF


def _mappings(found: Vmm) -> list[Mapping]:
    return [each for each in smaps.read(found.pid) if each.path == NAME]


def _frames(found: Vmm) -> dict[int, int]:
    frames = {}
    for each in _mappings(found):
        entries = pagemap.read(found.pid, each.start, each.size // PAGE_SIZE)
        for number, entry in enumerate(entries):
            if pagemap.present(entry) and pagemap.file_or_shared(entry):
                frames[each.start + number * PAGE_SIZE] = pagemap.pfn(entry) or 0
    return frames


def _read_all(found: Vmm) -> None:
    """Have the pages mapped that the VMM itself has not touched since."""
    with Path(f"/proc/{found.pid}/mem").open("rb") as memory:
        for each in _mappings(found):
            memory.seek(each.start)
            assert len(memory.read(each.size)) == each.size


@contextmanager
def _waiting(server: ForkServer, folder: Path, count: int) -> Iterator[list[Vmm]]:
    with ExitStack() as ends:
        folder.mkdir()
        folder.chmod(0o711)
        yield [ends.enter_context(vmm(folder / f"{n}", server, *WAITING)) for n in range(count)]


@contextmanager
def _template(number: int) -> Iterator[int]:
    """Open a template of the only server, as a VMM that was taken over may use it."""
    (pid,) = fork_registry.pids()
    fd = os.open(f"/proc/{pid}/fd/{FIRST + number}", os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def _seals(number: int) -> int:
    with _template(number) as fd:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid():
        cannot_run("page frame numbers need root")


def test_vmms_that_wait_have_the_same_physical_pages(server: ForkServer, tmp_path: Path) -> None:
    with _waiting(server, tmp_path / "w", 3) as found:
        one, two = found[:2]
        for each in found:
            assert not each.started.why_exec
            assert {mapping.perms for mapping in _mappings(each)} == {"rw-p"}
            # None keeps a descriptor of it.
            assert not [link for link in each.descriptors() if "template" in link]
            _read_all(each)
        same = _frames(one).items() & _frames(two).items()
        # Most of the three tables, and in one copy.
        assert len(same) > 3 * 38 * 0.8
        assert _seals(0) == SEALS
        assert one.execute("query-status")["status"] == "inmigrate"


def test_a_vmm_that_boots_has_none(server: ForkServer, tmp_path: Path) -> None:
    with vmm(tmp_path / "a", server, *DEVICES) as one:
        assert not _mappings(one)
        assert not [link for link in one.descriptors() if "template" in link]
        assert _seals(0) == 0


def test_a_template_with_other_content_is_not_used(server: ForkServer, tmp_path: Path) -> None:
    with vmm(tmp_path / "a", server, *DEVICES):
        with _template(0) as fd:
            os.pwrite(fd, b"\xff" * (4 << 20), 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        with _template(1) as fd:
            # Not sealed, so whoever waits writes it.
            os.pwrite(fd, b"\xff" * (1 << 20), 0)
        with _waiting(server, tmp_path / "w", 2) as found:
            for each in found:
                _read_all(each)
                assert each.execute("query-status")["status"] == "inmigrate"
            one, two = map(_frames, found)
            assert len(one.items() & two.items()) > 3 * 38 * 0.8
            assert [_seals(number) for number in range(3)] == [SEALS, SEALS, 0]


def test_a_template_that_can_still_be_written_is_not_used(
    server: ForkServer, tmp_path: Path
) -> None:
    with vmm(tmp_path / "a", server, *DEVICES), _template(0) as fd:
        # Held by somebody who does not end.
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with _waiting(server, tmp_path / "w", 2) as found:
            assert [_seals(number) for number in range(2)] == [0, SEALS]
            for each in found:
                assert _mappings(each)
