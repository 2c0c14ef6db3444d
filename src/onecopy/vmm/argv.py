"""The QEMU command line, as a pure function of what the guest is made of.

Nothing here touches the host: tested as text (tests/unit/test_argv.py) and by really starting what
it builds (tests/vm). Devices have fixed slots and ids, so that a saved system finds the same
machine again (QEMU docs/devel/migration/main.rst: source and destination must be configured alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from onecopy.model import HUGE_PAGE_SIZE, MIB

#: PCI slots on the q35 root bus; segments follow from the first segment slot on.
SERIAL_SLOT = 0x02
NETWORK_SLOT = 0x03
FIRST_SEGMENT_SLOT = 0x10
MAX_SEGMENTS = 0x1F - FIRST_SEGMENT_SLOT
#: (pipe in the run folder, port name in the guest); port 0 is kept for a console.
PORTS = (("agent", "org.onecopy.agent.0"), ("identity", "org.onecopy.identity.0"))

KERNEL_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 "
    # maxmem would make Linux set aside 64 MiB for bounce buffers that no device here needs.
    "swiotlb=noforce "
    # QEMU's TSC does not drift between vCPUs of one VMM: no watchdog timer that wakes idle guests.
    "tsc=reliable nowatchdog "
    "random.trust_cpu=on net.ifnames=0"
)


@dataclass(frozen=True, slots=True)
class Slot:
    """One segment as the machine sees it: a virtio-pmem device over a read-only shared blob."""

    path: Path
    size: int
    """Bytes; a multiple of 2 MiB."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What must be the same when a saved system is started as when it was saved."""

    machine: str
    """Versioned machine type, for example ``pc-q35-7.2``."""
    cpu: str
    cpus: int
    memory: int
    """Bytes of guest RAM."""
    network: bool
    segments: tuple[Slot, ...]


class Ram(StrEnum):
    """What backs guest RAM."""

    ANONYMOUS = "anonymous"
    """The VMM's own memory: a cold guest."""
    SAVING = "saving"
    """A file mapped shared: what the guest writes is in the file (a guest about to be saved)."""
    COPY_ON_WRITE = "copy-on-write"
    """A saved system's file mapped private: unwritten pages are shared by all its guests."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A direct kernel boot."""

    image: Path
    initrd: Path
    append: str = ""


@dataclass(frozen=True, slots=True)
class Launch:
    """What belongs to one QEMU process and may differ between starts."""

    binary: str
    accel: str
    name: str
    folder: Path
    """The run folder: sockets, pipes and logs."""
    monitor_fd: int | str
    """Listening UNIX socket that the VMM inherits, for QMP."""
    console_fd: int | str
    """The same for the serial console."""
    ram: Ram
    ram_path: Path | None = None
    ram_readonly_file: bool = False
    """This QEMU can map a read-only RAM file copy-on-write (``rom=off``, QEMU >= 8.2)."""
    kernel: Kernel | None = None
    """None: the machine waits for a saved state (``-incoming defer``)."""
    publish: tuple[tuple[int, int], ...] = ()
    """(port on 127.0.0.1 or 0 for any, port of the guest) pairs."""
    merge: bool = False
    """KSM may merge the VMM's own memory (spawn.py); not on the command line."""
    extra: tuple[str, ...] = field(default=())


def command(hardware: Hardware, launch: Launch) -> list[str]:
    """The whole QEMU command line."""
    return [
        launch.binary,
        *_process(launch),
        *_machine(hardware, launch),
        *_ram(hardware, launch),
        *_channels(launch),
        *_network(hardware, launch),
        *_segments(hardware.segments),
        *_start(launch),
        *launch.extra,
    ]


def _process(launch: Launch) -> list[str]:
    return [
        "-name",
        f"guest={launch.name}",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]


def _machine(hardware: Hardware, launch: Launch) -> list[str]:
    # What no guest here uses is left out: each device costs start time, memory and timer ticks.
    options = "hpet=off,vmport=off,smm=off,smbus=off,sata=off,usb=off,i8042=off,pit=on,graphics=off"
    return [
        "-machine",
        f"{hardware.machine},{options},memory-backend=ram",
        "-accel",
        launch.accel,
        "-cpu",
        hardware.cpu,
        "-smp",
        str(hardware.cpus),
        "-rtc",
        "base=utc",
        "-device",
        "vmgenid,guid=auto",
    ]


def _ram(hardware: Hardware, launch: Launch) -> list[str]:
    size = hardware.memory
    match launch.ram:
        case Ram.ANONYMOUS:
            backend = f"memory-backend-ram,id=ram,size={size}"
        case Ram.SAVING:
            backend = f"memory-backend-file,id=ram,size={size},mem-path={launch.ram_path},share=on"
        case Ram.COPY_ON_WRITE:
            backend = f"memory-backend-file,id=ram,size={size},mem-path={launch.ram_path},share=off"
            if launch.ram_readonly_file:
                backend += ",readonly=on,rom=off"
    # virtio-pmem devices live in the hot-plug region above RAM.
    room = sum(slot.size + HUGE_PAGE_SIZE for slot in hardware.segments)
    ceiling = size + -(-room // (1024 * MIB)) * 1024 * MIB + 1024 * MIB
    return ["-object", backend, "-m", f"size={size}B,slots=1,maxmem={ceiling}B"]


def _channels(launch: Launch) -> list[str]:
    folder = launch.folder
    return [
        "-chardev",
        f"socket,id=monitor,fd={launch.monitor_fd},server=on,wait=off",
        "-mon",
        "chardev=monitor,mode=control",
        "-chardev",
        f"socket,id=console,fd={launch.console_fd},server=on,wait=off,logfile={folder}/console.log",
        "-serial",
        "chardev:console",
        "-device",
        f"virtio-serial-pci,id=serial,addr={SERIAL_SLOT:#x}",
        *_ports(folder),
    ]


def _ports(folder: Path) -> list[str]:
    # A pipe is always open: the agent in the guest never sees its peer go, which would make it
    # poll ten times a second (qga/main.c).
    argv = []
    for number, (pipe, name) in enumerate(PORTS, start=1):
        argv += ["-chardev", f"pipe,id={pipe},path={folder}/{pipe}"]
        port = f"virtserialport,bus=serial.0,nr={number},chardev={pipe},name={name}"
        argv += ["-device", port]
    return argv


def _network(hardware: Hardware, launch: Launch) -> list[str]:
    if not hardware.network:
        return []
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in launch.publish)
    return [
        "-netdev",
        f"user,id=net,ipv6=off{forwards}",
        "-device",
        # No gratuitous ARP after a start: each guest is alone in its network.
        f"virtio-net-pci,netdev=net,addr={NETWORK_SLOT:#x},romfile=,guest_announce=off",
    ]


def _segments(segments: Sequence[Slot]) -> list[str]:
    argv = []
    for number, slot in enumerate(segments):
        argv += [
            "-object",
            f"memory-backend-file,id=segment{number},size={slot.size},mem-path={slot.path},"
            "share=on,readonly=on",
            "-device",
            f"virtio-pmem-pci,memdev=segment{number},addr={FIRST_SEGMENT_SLOT + number:#x}",
        ]
    return argv


def _start(launch: Launch) -> list[str]:
    if launch.kernel is None:
        return ["-incoming", "defer"]
    return [
        "-kernel",
        str(launch.kernel.image),
        "-initrd",
        str(launch.kernel.initrd),
        "-append",
        f"{KERNEL_LINE} {launch.kernel.append}".rstrip(),
    ]
