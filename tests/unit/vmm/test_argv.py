"""QEMU's command line: as text, one golden file per option, and by starting what it says.

ONECOPY_REGENERATE=1 writes the golden files (data/argv) anew: look at the difference.
"""

import asyncio
import os
import socket
from pathlib import Path

import pytest
from msgspec.structs import fields, replace

from onecopy.errors import GuestFailed, MissingProgram
from onecopy.model import HUGE_PAGE_SIZE, MIB, Mergeable
from onecopy.vmm.argv import (
    LEAST_TRANSLATED,
    MAX_SEGMENTS,
    Backing,
    Hardware,
    Kernel,
    Launch,
    MapMode,
    Nic,
    Ram,
    command,
)
from onecopy.vmm.monitor import connect
from onecopy.vmm.qemu import Qemu, probe
from onecopy.vmm.qemu_process import launch, prepare
from tests.conftest import cannot_run

GOLDEN = Path(__file__).parents[1] / "data/argv"
Case = tuple[Hardware, Launch]


def _cases(root: Path) -> dict[str, Case]:
    """Machines whose files are in ``root``: a clone, and what differs from it in one option."""
    hardware = Hardware(
        machine="pc-q35-7.2",
        cpu="max",
        cpus=1,
        memory=128 * MIB,
        network=True,
        segments=(Backing(root / "segment0", HUGE_PAGE_SIZE),),
    )
    many = tuple(
        Backing(root / f"segment{n}", (n + 1) * HUGE_PAGE_SIZE) for n in range(MAX_SEGMENTS)
    )
    card = Nic("02:00:00:00:00:01", "198.18.1.0")
    clone = Launch(
        binary="/usr/bin/qemu-system-x86_64",
        accel="tcg",
        name="web-1",
        folder=root / "web-1",
        monitor_fd="FD",
        console_fd="FD",
        ram=Ram.COPY_ON_WRITE,
        ram_path=root / "ram",
        card=card,
    )
    modes = tuple(Backing(root / mode, HUGE_PAGE_SIZE, mode) for mode in MapMode)
    kernel = Kernel(root / "vmlinuz", root / "initrd")
    cold = replace(clone, ram=Ram.ANONYMOUS, ram_path=None, kernel=kernel)
    return {
        "clone": (hardware, clone),
        "rom": (hardware, replace(clone, rom=True)),
        "cold": (hardware, cold),
        "append": (hardware, replace(cold, kernel=replace(kernel, append="init=/bin/sh"))),
        "bare": (
            replace(hardware, segments=()),
            replace(cold, kernel=Kernel(root / "vmlinuz", None)),
        ),
        "kvm": (replace(hardware, cpu="host"), replace(clone, accel="kvm")),
        "cpus": (replace(hardware, cpus=4), clone),
        "memory": (replace(hardware, memory=1024 * MIB), clone),
        "bridge": (hardware, replace(clone, card=Nic("02:00:00:00:00:01", "", "FD"))),
        "no-network": (replace(hardware, network=False), clone),
        "publish": (hardware, replace(clone, publish=((8080, 80), (0, 443)))),
        "no-segments": (replace(hardware, segments=()), clone),
        "many-segments": (replace(hardware, segments=many), clone),
        "classes": (replace(hardware, segments=modes), clone),
        "classes-rom": (replace(hardware, segments=modes), replace(clone, rom=True)),
        "unmergeable": (hardware, replace(clone, ksm=Mergeable.NONE)),
        "traces": (hardware, replace(clone, traces=("qemu_system_shutdown_request", "other"))),
        "translated": (hardware, replace(clone, translated=LEAST_TRANSLATED)),
        "extra": (hardware, replace(clone, extra=("-S",))),
    }


NAMES = sorted(_cases(Path("/store")))
#: The name of a thing that goes into the line as it is; what differs by host comes from a probe.
_PLAIN = {"machine", "binary", "name", "folder", "monitor_fd", "console_fd"}
#: Not on the line: what the VMM is confined to (confine.py).
_BESIDE = {"later", "ports_later"}


def _text(case: Case) -> str:
    """One option and its value on a line."""
    return "\n".join(command(*case)).replace("\n-", "\0-").replace("\n", " ").replace("\0", "\n")


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    text = _text(_cases(Path("/store"))[name]) + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("ONECOPY_REGENERATE") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.read_text() == text


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(NAMES)


def test_every_field_is_exercised() -> None:
    cases = _cases(Path("/store")).values()
    fixed = set()
    for values in ([hardware for hardware, _ in cases], [spec for _, spec in cases]):
        for field in fields(values[0]):
            if len({getattr(value, field.name) for value in values}) == 1:
                fixed.add(field.name)
    assert fixed == _PLAIN | _BESIDE


def test_devices_stay_in_their_slots() -> None:
    """A saved system must find each device again where it was."""
    cases = _cases(Path("/store"))
    lines = {name: _text(case).splitlines() for name, case in cases.items()}
    for name in NAMES:
        pmem = [line for line in lines[name] if "virtio-pmem-pci" in line]
        assert pmem == [
            f"-device virtio-pmem-pci,memdev=segment{n},addr={0x10 + n:#x}"
            for n in range(len(cases[name][0].segments))
        ]
        assert [line for line in lines[name] if "virtserialport" in line] == [
            line for line in lines["clone"] if "virtserialport" in line
        ]


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Qemu:
    try:
        return probe(tmp_path_factory.mktemp("cache"))
    except MissingProgram as error:
        cannot_run(error.message)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("kvm", "bridge")])
def test_qemu_takes_it(name: str, qemu: Qemu, tmp_path: Path) -> None:
    """Start it and ask what it waits for.

    Not "kvm", which needs a host that has it, and "bridge" (tests/vm/test_network.py).
    """
    hardware, spec = _cases(tmp_path)[name]
    _make_files(tmp_path, hardware)
    spec.folder.mkdir()
    prepare(spec.folder)
    hardware = replace(hardware, machine=qemu.machine)
    spec = replace(spec, binary=qemu.binary, publish=_free(spec.publish))
    # What would run is held back.
    spec = replace(spec, extra=("-S",) if spec.kernel else spec.extra)
    if spec.rom and not qemu.rom:
        with pytest.raises(GuestFailed):
            asyncio.run(_state(hardware, spec))
        assert "rom" in (spec.folder / "qemu.log").read_text()
        return
    expected = "prelaunch" if spec.kernel else "inmigrate"
    status, memory, cpus = asyncio.run(_state(hardware, spec))
    assert (status, memory, cpus) == (expected, hardware.memory, hardware.cpus)


def _make_files(root: Path, hardware: Hardware) -> None:
    """Sparse ones; the kernel is a head that QEMU's loader takes (Documentation/arch/x86/boot)."""
    sizes = {slot.path: slot.size for slot in hardware.segments}
    for path, size in {**sizes, root / "ram": hardware.memory, root / "initrd": 4096}.items():
        with path.open("wb") as file:
            file.truncate(size)
    head = bytearray(64 << 10)
    head[0x1F1] = 4  # setup_sects
    head[0x202:0x208] = b"HdrS\x0c\x02"
    head[0x211] = 1  # loadflags: LOADED_HIGH
    head[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")  # initrd_addr_max
    head[0x238:0x23C] = (2048).to_bytes(4, "little")  # cmdline_size
    (root / "vmlinuz").write_bytes(head)


def _free(publish: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same, with host ports that are free here."""
    found = []
    for host, guest in publish:
        with socket.socket() as probe_:
            probe_.bind(("127.0.0.1", 0))
            found.append((probe_.getsockname()[1] if host else 0, guest))
    return tuple(found)


async def _state(hardware: Hardware, spec: Launch) -> tuple[str, int, int]:
    """Run state, bytes of RAM and number of processors, as QEMU says."""
    vmm = launch(hardware, spec)
    try:
        async with connect(spec.folder) as monitor:
            status = (await monitor.execute("query-status"))["status"]
            size = (await monitor.execute("query-memory-size-summary"))["base-memory"]
            cpus = len(await monitor.execute("query-cpus-fast"))
            pmem = await monitor.execute("query-memory-devices")
            assert len(pmem) == len(hardware.segments)
            return status, size, cpus
    finally:
        await vmm.kill()
