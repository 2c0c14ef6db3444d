"""Build the QEMU command line as a pure function of the guest's components.

Nothing here accesses the host. Tests check the result as text (tests/unit/vmm/test_argv.py) and
start it (tests/vm). Devices have fixed slots and ids, because a saved system must find the same
machine again.

Source:
    QEMU docs/devel/migration/main.rst (source and destination must be configured alike).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from onecopy.model import HUGE_PAGE_SIZE, MIB, Mergeable, align_up

#: PCI slots on the q35 root bus; segments use the slots from FIRST_SEGMENT_SLOT on.
SERIAL_SLOT = 0x02
NETWORK_SLOT = 0x03
BRIDGE_SLOT = 0x04
FIRST_SEGMENT_SLOT = 0x10
MAX_SEGMENTS = 0x1F - FIRST_SEGMENT_SLOT
#: The id of the virtio-serial device.
SERIAL = "serial"
#: The id of the memory backend of RAM.
RAM_BACKEND = "ram"
#: The root bus does not support hot-plug; the bus behind this bridge does.
HOT_BUS = "hot"
#: Slots on that bus; slot 0 belongs to the bridge's hot-plug controller.
HOT_SLOTS = range(1, 32)
#: Bytes of guest address space for hot-plugged segments. Unused space costs nothing; more would
#: exceed the 39 address bits of some CPUs.
HOT_ROOM = 64 << 30
#: The minimum number of vCPU slots of a machine: clones can have more vCPUs than were saved.
_CPU_ROOM = 8
#: (pipe in the run directory, port name in the guest); port 0 is reserved for a console.
PORTS = (
    ("agent", "org.onecopy.agent.0"),
    ("identity", "org.onecopy.identity.0"),
    ("segment", "org.onecopy.segment.0"),
)

#: The user-mode network of each guest, in a range that no real network uses (RFC 2544). It is the
#: same for all guests, except for the guest's address from FIRST_ADDRESS on.
NETWORK = ipaddress.IPv4Network("198.18.0.0/15")
GATEWAY = NETWORK[2]
NAME_SERVER = NETWORK[3]
FIRST_ADDRESS = NETWORK[256]

KERNEL_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 "
    # Without this, maxmem makes Linux reserve 64 MiB for bounce buffers that no device needs.
    "swiotlb=noforce "
    # QEMU's TSC does not drift between a VMM's vCPUs; watchdog timers would wake idle guests.
    "tsc=reliable nowatchdog mce=ignore_ce "
    # So would housekeeping timers: compaction of memory, and statistics that nobody reads.
    "sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=60 "
    "random.trust_cpu=on net.ifnames=0"
)
#: Bytes for code translated by TCG: what workloads need (benchmarks/translated.py), and the minimum
#: for starting a guest. A full buffer is dropped and filled again (tcg/region.c). QEMU's default is
#: up to 1 GiB.
TRANSLATED, LEAST_TRANSLATED = 128 * MIB, 32 * MIB
#: The command line of a bare kernel, which may not be Linux.
BARE_KERNEL_LINE = "console=ttyS0,115200"


class MapMode(StrEnum):
    """How the memory of a device is mapped."""

    READ_ONLY = "read-only"
    """All guests see the file, and none can write to it."""
    SHARED = "shared"
    """The guest's writes go to the file."""
    COPY_ON_WRITE = "copy-on-write"
    """The guest's writes stay private to it."""


class Backing(msgspec.Struct, frozen=True):
    """The backing of a range of a segment: the file under its virtio-pmem device."""

    path: Path
    """The path that QEMU opens."""
    size: int
    """Bytes, a multiple of 2 MiB; the file may be longer."""
    mode: MapMode = MapMode.READ_ONLY
    mapped: str = ""
    """The path in the VMM's /proc/PID/maps; "" for a dry run."""
    file: str = ""
    """The file of the store whose pages the range shares until it is written; "" for none."""


class Hardware(msgspec.Struct, frozen=True):
    """The properties that must be the same when a saved system is saved and started."""

    machine: str
    """The versioned machine type, for example ``pc-q35-7.2``."""
    cpu: str
    cpus: int
    memory: int
    """Bytes of guest RAM."""
    network: bool
    segments: tuple[Backing, ...]


class Ram(StrEnum):
    """What backs guest RAM."""

    ANONYMOUS = "anonymous"
    """The VMM's own memory, for a booted guest."""
    COPY_ON_WRITE = "copy-on-write"
    """A saved system's file, mapped private: clones share the pages that none has written to."""


class Kernel(msgspec.Struct, frozen=True):
    """A direct kernel boot."""

    image: Path
    initrd: Path | None
    """None for a bare kernel."""
    append: str = ""


class Nic(msgspec.Struct, frozen=True):
    """A guest's network card and its connection."""

    mac: str
    """A clone gets it when the guest sets it, because QEMU loads the address of the saved state."""
    address: str
    """The address in the guest's user-mode network; "" in a bridge, whose network assigns one."""
    tap: int | str | None = None
    """A tap device that the VMM inherits; None for QEMU's user-mode network."""
    life: int | None = None
    """A descriptor that the VMM keeps open for its lifetime, for its router (router.py)."""
    allow_host: bool = False
    """Whether a user-mode network reaches the host's addresses, and 127.0.0.1 as its gateway."""

    @property
    def closed(self) -> bool:
        """Whether this host must be unreachable for QEMU's traffic (closed_network.py)."""
        return self.tap is None and not self.allow_host

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that the VMM inherits for the card."""
        return [fd for fd in (self.tap, self.life) if isinstance(fd, int)]


def guest_network(card: Nic | None) -> str:
    """Return the guest's settings: "ADDRESS MASK GATEWAY NAME-SERVER", "dhcp", or "-" for none."""
    if card is None:
        return "-"
    if not card.address:
        return "dhcp"
    return f"{card.address} {NETWORK.netmask} {GATEWAY} {NAME_SERVER}"


class Launch(msgspec.Struct, frozen=True):
    """The properties of one QEMU process, which may differ between starts."""

    binary: str
    accel: str
    name: str
    folder: Path
    """The run directory, with sockets, pipes and logs."""
    monitor_fd: int | str
    """The listening UNIX socket for QMP that the VMM inherits."""
    console_fd: int | str
    """The same for the serial console."""
    ram: Ram
    ram_path: Path | None = None
    rom: bool = False
    """Whether this QEMU can map a read-only file copy-on-write (``rom=off``, QEMU >= 8.2)."""
    traces: tuple[str, ...] = ()
    """Trace events by which this QEMU logs how it ends (end_traces.py)."""
    kernel: Kernel | None = None
    """None makes the machine wait for a saved state (``-incoming defer``)."""
    card: Nic | None = None
    """None for a machine without a network."""
    publish: tuple[tuple[int, int], ...] = ()
    """Pairs of (port on 127.0.0.1 or 0 for any, port of the guest)."""
    ports_later: bool = False
    """Whether ports may be published while the guest runs."""
    translated: int = TRANSLATED
    """Bytes for translated code under TCG."""
    ksm: Mergeable = Mergeable.RAM
    """What KSM may merge: guest RAM (QEMU) or all of QEMU (spawn.py), across trust domains.
    """
    later: Path | None = None
    """Directory of files that may be hot-plugged (store/lease.py); not part of the command line."""
    extra: tuple[str, ...] = msgspec.field(default=())


def command(hardware: Hardware, launch: Launch) -> list[str]:
    """Build the whole QEMU command line."""
    return [
        launch.binary,
        *_process(launch),
        *_machine(hardware, launch),
        *_ram(hardware, launch),
        *_channels(launch),
        *_network(hardware, launch),
        *_segments(hardware.segments, rom=launch.rom),
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
        *(word for name in launch.traces for word in ("-trace", name)),
    ]


def _machine(hardware: Hardware, launch: Launch) -> list[str]:
    # All unused devices are omitted: each costs start time, memory and timer ticks.
    options = "hpet=off,vmport=off,smm=off,smbus=off,sata=off,usb=off,i8042=off,pit=on,graphics=off"
    if launch.kernel is None:
        options += ",suppress-vmdesc=on"
    if launch.ksm is Mergeable.NONE:
        options += ",mem-merge=off"
    return [
        "-machine",
        f"{hardware.machine},{options},memory-backend={RAM_BACKEND}",
        "-accel",
        accelerator(launch.accel, launch.translated),
        "-cpu",
        hardware.cpu,
        "-smp",
        _processors(hardware.cpus),
        "-rtc",
        "base=utc",
        "-device",
        "vmgenid,guid=auto",
    ]


def accelerator(name: str, translated: int = TRANSLATED) -> str:
    """Return the value of ``-accel``, with ``translated`` bytes for translated code under TCG."""
    # The size is not part of a machine's state, so a saved system starts with any size.
    return f"tcg,tb-size={translated // MIB}" if name == "tcg" else name


def _processors(cpus: int) -> str:
    # Each group of further vCPUs is a socket of its own: Linux from 6.9 on may ignore free places
    # beside existing vCPUs (topo_register_apic() in arch/x86/kernel/cpu/topology.c).
    room = cpu_room(cpus)
    return f"cpus={cpus},maxcpus={room},sockets={room // cpus},cores={cpus},threads=1"


def cpu_room(cpus: int) -> int:
    """Return the maximum number of vCPUs of a machine that starts with ``cpus``."""
    return align_up(_CPU_ROOM, cpus)


def _ram(hardware: Hardware, launch: Launch) -> list[str]:
    size = hardware.memory
    match launch.ram:
        case Ram.ANONYMOUS:
            backend = f"memory-backend-ram,id={RAM_BACKEND},size={size}"
        case Ram.COPY_ON_WRITE:
            backend = f"memory-backend-file,id={RAM_BACKEND},size={size}"
            backend += f",mem-path={launch.ram_path},share=off"
            if launch.rom:
                backend += ",readonly=on,rom=off"
    # virtio-pmem devices are in the hot-plug region above RAM.
    room = sum(each.size + HUGE_PAGE_SIZE for each in hardware.segments)
    ceiling = size + -(-room // (1024 * MIB)) * 1024 * MIB + HOT_ROOM
    return ["-object", backend, "-m", f"size={size}B,slots=1,maxmem={ceiling}B"]


def _channels(launch: Launch) -> list[str]:
    folder = launch.folder
    return [
        "-chardev",
        f"socket,id=monitor,fd={launch.monitor_fd},server=on,wait=off",
        "-mon",
        "chardev=monitor,mode=control",
        "-chardev",
        f"socket,id=console,fd={launch.console_fd},server=on,wait=off,logfile={folder}/console.log"
        # logs.py limits its size.
        ",logappend=on",
        "-serial",
        "chardev:console",
        "-device",
        f"virtio-serial-pci,id={SERIAL},addr={SERIAL_SLOT:#x}",
        *_ports(folder),
    ]


def _ports(folder: Path) -> list[str]:
    # A pipe is always open, so the agent never sees its peer disconnect. It would then poll ten
    # times a second (qga/main.c).
    argv = []
    for number, (pipe, name) in enumerate(PORTS, start=1):
        argv += ["-chardev", f"pipe,id={pipe},path={folder}/{pipe}"]
        port = f"virtserialport,bus={SERIAL}.0,nr={number},chardev={pipe},name={name}"
        argv += ["-device", port]
    return argv


def _network(hardware: Hardware, launch: Launch) -> list[str]:
    card = launch.card
    if not hardware.network or not card:
        return []
    device = f"virtio-net-pci,netdev=net,mac={card.mac},addr={NETWORK_SLOT:#x},romfile="
    # No gratuitous ARP after a start, because it would have the address of the saved guest.
    return [*_netdevs(card, launch), "-device", f"{device},guest_announce=off"]


def _netdevs(card: Nic, launch: Launch) -> list[str]:
    if card.tap is not None:
        # vhost is off, because user-mode networks lack its offloads. The saved state of a system
        # that has a user-mode network also loads here, thanks to the unused one.
        unused = [] if launch.kernel else ["-netdev", "user,id=unused,restrict=on"]
        return ["-netdev", f"tap,id=net,fd={card.tap},vhost=off", *unused]
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in launch.publish)
    addresses = f"net={NETWORK},host={GATEWAY},dns={NAME_SERVER},dhcpstart={card.address}"
    return ["-netdev", f"user,id=net,ipv6=off,{addresses}{forwards}"]


def backend(name: str, backing: Backing, *, rom: bool) -> dict[str, str | int | bool]:
    """Describe the memory of a range as properties of a QEMU object (qemu-qmp-ref, object-add)."""
    properties: dict[str, str | int | bool] = {
        "qom-type": "memory-backend-file",
        "id": name,
        "size": backing.size,
        "mem-path": str(backing.path),
        "share": backing.mode is not MapMode.COPY_ON_WRITE,
    }
    if backing.mode is MapMode.READ_ONLY:
        properties["readonly"] = True
    elif backing.mode is MapMode.COPY_ON_WRITE and rom:
        properties |= {"readonly": True, "rom": "off"}
    return properties


def _segments(segments: Sequence[Backing], *, rom: bool) -> list[str]:
    argv = ["-device", f"pcie-pci-bridge,id={HOT_BUS},addr={BRIDGE_SLOT:#x}"]
    for number, backing in enumerate(segments):
        memory, *properties = backend(f"segment{number}", backing, rom=rom).items()
        argv += [
            "-object",
            ",".join([str(memory[1]), *(f"{key}={_format(value)}" for key, value in properties)]),
            "-device",
            f"virtio-pmem-pci,memdev=segment{number},addr={FIRST_SEGMENT_SLOT + number:#x}",
        ]
    return argv


def _format(value: str | int | bool) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _start(launch: Launch) -> list[str]:
    if launch.kernel is None:
        # The state does not describe the machine (monitor.py): the system's record does.
        return ["-incoming", "defer", "-global", "migration.send-configuration=off"]
    image, initrd = launch.kernel.image, launch.kernel.initrd
    if initrd is None:
        return ["-kernel", str(image), "-append", BARE_KERNEL_LINE]
    line = f"{KERNEL_LINE} {launch.kernel.append}".rstrip()
    return ["-kernel", str(image), "-initrd", str(initrd), "-append", line]
