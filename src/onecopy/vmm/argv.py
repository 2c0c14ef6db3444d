"""The QEMU command line, as a pure function of what the guest is made of.

Nothing here touches the host: tested as text (tests/unit/vmm/test_argv.py) and by really starting
what it builds (tests/vm). Devices have fixed slots and ids, so that a saved system finds the same
machine again (QEMU docs/devel/migration/main.rst: source and destination must be configured alike).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from onecopy.model import HUGE_PAGE_SIZE, MIB, Mergeable, align_up

#: PCI slots on the q35 root bus; segments follow from the first segment slot on.
SERIAL_SLOT = 0x02
NETWORK_SLOT = 0x03
BRIDGE_SLOT = 0x04
FIRST_SEGMENT_SLOT = 0x10
MAX_SEGMENTS = 0x1F - FIRST_SEGMENT_SLOT
#: Id of the virtio-serial device.
SERIAL = "serial"
#: The root bus takes no device while the guest runs; the bus behind this bridge does.
HOT_BUS = "hot"
#: Slots there. Slot 0 is the bridge's own hot-plug controller's.
HOT_SLOTS = range(1, 32)
#: Bytes of guest address space for segments that come while the guest runs. It costs nothing as
#: long as it is empty; more would not fit the 39 bits of address that some processors have.
HOT_ROOM = 64 << 30
#: Processors, at least, that a machine has room for: clones can have more than were saved.
_CPU_ROOM = 8
#: (pipe in the run folder, port name in the guest); port 0 is kept for a console.
PORTS = (
    ("agent", "org.onecopy.agent.0"),
    ("identity", "org.onecopy.identity.0"),
    ("segment", "org.onecopy.segment.0"),
)

#: Each guest's user-mode network: addresses that no real network has (RFC 2544). All are the same
#: for all guests, but for their own address, from the first one on.
NETWORK = ipaddress.IPv4Network("198.18.0.0/15")
GATEWAY = NETWORK[2]
NAME_SERVER = NETWORK[3]
FIRST_ADDRESS = NETWORK[256]

KERNEL_LINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 "
    # maxmem would make Linux set aside 64 MiB for bounce buffers that no device here needs.
    "swiotlb=noforce "
    # QEMU's TSC does not drift between vCPUs of one VMM: no watchdog timer that wakes idle guests.
    "tsc=reliable nowatchdog mce=ignore_ce "
    # Nor do tidy-up timers: memory in no need of compacting, counters that nobody reads.
    "sysctl.vm.compaction_proactiveness=0 sysctl.vm.stat_interval=60 "
    "random.trust_cpu=on net.ifnames=0"
)
#: Bytes of QEMU's memory for the guest's code as TCG has translated it: as much as work needs
#: (benchmarks/translated.py), and the least that a guest is started with. Once they are full all is
#: dropped, and translated anew when it runs (tcg/region.c). QEMU's own choice is up to 1 GiB.
TRANSLATED, LEAST_TRANSLATED = 128 * MIB, 32 * MIB
#: What a kernel by itself is told, which may not be Linux.
BARE_KERNEL_LINE = "console=ttyS0,115200"


class MapMode(StrEnum):
    """How the memory of a device is mapped."""

    READ_ONLY = "read-only"
    """All see the file, nobody writes to it."""
    SHARED = "shared"
    """What the guest writes is in the file."""
    COPY_ON_WRITE = "copy-on-write"
    """What the guest writes is its own."""


class Slot(msgspec.Struct, frozen=True):
    """One range of a segment as the machine sees it: a virtio-pmem device over a file."""

    path: Path
    size: int
    """Bytes; a multiple of 2 MiB. The file may be longer."""
    mode: MapMode = MapMode.READ_ONLY


class Hardware(msgspec.Struct, frozen=True):
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
    COPY_ON_WRITE = "copy-on-write"
    """A saved system's file mapped private: unwritten pages are shared by all its guests."""


class Kernel(msgspec.Struct, frozen=True):
    """A direct kernel boot."""

    image: Path
    initrd: Path | None
    """None: it is booted by itself."""
    append: str = ""


class Nic(msgspec.Struct, frozen=True):
    """A guest's network card, and where it leads."""

    mac: str
    """A clone has it once the guest has set it: QEMU takes the one of the saved state."""
    address: str
    """In the guest's own network; "" in a bridge, whose network gives one."""
    tap: int | str | None = None
    """Descriptor of a tap device that the VMM inherits; None for QEMU's user-mode network."""
    life: int | None = None
    """Another that it holds as long as it lives: that of its router (router.py)."""
    allow_host: bool = False
    """Whether a user-mode network reaches the host's 127.0.0.1, as its gateway, and addresses."""

    @property
    def closed(self) -> bool:
        """Whether what QEMU sends is to be kept from this host (closed_network.py)."""
        return self.tap is None and not self.allow_host

    @property
    def descriptors(self) -> list[int]:
        """What the VMM inherits for it."""
        return [fd for fd in (self.tap, self.life) if isinstance(fd, int)]


def guest_network(card: Nic | None) -> str:
    """What a guest sets: address, mask, gateway and name server; "dhcp"; or "-" for no card."""
    if card is None:
        return "-"
    if not card.address:
        return "dhcp"
    return f"{card.address} {NETWORK.netmask} {GATEWAY} {NAME_SERVER}"


class Launch(msgspec.Struct, frozen=True):
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
    rom: bool = False
    """This QEMU can map a read-only file copy-on-write (``rom=off``, QEMU >= 8.2)."""
    traces: tuple[str, ...] = ()
    """Events by which this QEMU notes in its log how it ends (end_traces.py)."""
    kernel: Kernel | None = None
    """None: the machine waits for a saved state (``-incoming defer``)."""
    card: Nic | None = None
    """None if the machine has no network."""
    publish: tuple[tuple[int, int], ...] = ()
    """(port on 127.0.0.1 or 0 for any, port of the guest) pairs."""
    ports_later: bool = False
    """Ports may be published while it runs."""
    translated: int = TRANSLATED
    """Bytes for translated code under TCG."""
    ksm: Mergeable = Mergeable.RAM
    """QEMU offers the guest's memory to KSM, spawn.py the VMM's own. KSM knows no trust domains."""
    later: Path | None = None
    """Folder of files that the VMM may be given while it runs (store/lease.py); not on it, too."""
    extra: tuple[str, ...] = msgspec.field(default=())


def command(hardware: Hardware, launch: Launch) -> list[str]:
    """The whole QEMU command line."""
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
    # What no guest here uses is left out: each device costs start time, memory and timer ticks.
    options = "hpet=off,vmport=off,smm=off,smbus=off,sata=off,usb=off,i8042=off,pit=on,graphics=off"
    if launch.kernel is None:
        options += ",suppress-vmdesc=on"
    if launch.ksm is Mergeable.NONE:
        options += ",mem-merge=off"
    return [
        "-machine",
        f"{hardware.machine},{options},memory-backend=ram",
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
    """Return the value of ``-accel``, with that many bytes for translated code under TCG."""
    # It is no part of a machine's state: what was saved with another size starts.
    return f"tcg,tb-size={translated // MIB}" if name == "tcg" else name


def _processors(cpus: int) -> str:
    # Further ones have sockets of their own: Linux from 6.9 on may not believe in room beside
    # processors that are there (topo_register_apic() in arch/x86/kernel/cpu/topology.c).
    room = cpu_room(cpus)
    return f"cpus={cpus},maxcpus={room},sockets={room // cpus},cores={cpus},threads=1"


def cpu_room(cpus: int) -> int:
    """How many processors a machine that starts with ``cpus`` can have."""
    return align_up(_CPU_ROOM, cpus)


def _ram(hardware: Hardware, launch: Launch) -> list[str]:
    size = hardware.memory
    match launch.ram:
        case Ram.ANONYMOUS:
            backend = f"memory-backend-ram,id=ram,size={size}"
        case Ram.COPY_ON_WRITE:
            backend = f"memory-backend-file,id=ram,size={size},mem-path={launch.ram_path},share=off"
            if launch.rom:
                backend += ",readonly=on,rom=off"
    # virtio-pmem devices live in the hot-plug region above RAM.
    room = sum(slot.size + HUGE_PAGE_SIZE for slot in hardware.segments)
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
        # Its size is limited (logs.py).
        ",logappend=on",
        "-serial",
        "chardev:console",
        "-device",
        f"virtio-serial-pci,id={SERIAL},addr={SERIAL_SLOT:#x}",
        *_ports(folder),
    ]


def _ports(folder: Path) -> list[str]:
    # A pipe is always open: the agent in the guest never sees its peer go, which would make it
    # poll ten times a second (qga/main.c).
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
    # No gratuitous ARP after a start: it would be with the address of the saved guest.
    return [*_netdevs(card, launch), "-device", f"{device},guest_announce=off"]


def _netdevs(card: Nic, launch: Launch) -> list[str]:
    if card.tap is not None:
        # Without offloads, which user-mode networks have not, and with one of these that leads
        # nowhere: so a system whose saved state has one starts here, too.
        unused = [] if launch.kernel else ["-netdev", "user,id=unused,restrict=on"]
        return ["-netdev", f"tap,id=net,fd={card.tap},vhost=off", *unused]
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in launch.publish)
    where = f"net={NETWORK},host={GATEWAY},dns={NAME_SERVER},dhcpstart={card.address}"
    return ["-netdev", f"user,id=net,ipv6=off,{where}{forwards}"]


def backend(name: str, slot: Slot, *, rom: bool) -> dict[str, str | int | bool]:
    """The memory of a range, as properties of QEMU's object (qemu-qmp-ref, object-add)."""
    properties: dict[str, str | int | bool] = {
        "qom-type": "memory-backend-file",
        "id": name,
        "size": slot.size,
        "mem-path": str(slot.path),
        "share": slot.mode is not MapMode.COPY_ON_WRITE,
    }
    if slot.mode is MapMode.READ_ONLY:
        properties["readonly"] = True
    elif slot.mode is MapMode.COPY_ON_WRITE and rom:
        properties |= {"readonly": True, "rom": "off"}
    return properties


def _segments(segments: Sequence[Slot], *, rom: bool) -> list[str]:
    argv = ["-device", f"pcie-pci-bridge,id={HOT_BUS},addr={BRIDGE_SLOT:#x}"]
    for number, slot in enumerate(segments):
        memory, *properties = backend(f"segment{number}", slot, rom=rom).items()
        argv += [
            "-object",
            ",".join([str(memory[1]), *(f"{key}={_text(value)}" for key, value in properties)]),
            "-device",
            f"virtio-pmem-pci,memdev=segment{number},addr={FIRST_SEGMENT_SLOT + number:#x}",
        ]
    return argv


def _text(value: str | int | bool) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _start(launch: Launch) -> list[str]:
    if launch.kernel is None:
        # The state says nothing about the machine (monitor.py): the system's record does.
        return ["-incoming", "defer", "-global", "migration.send-configuration=off"]
    image, initrd = launch.kernel.image, launch.kernel.initrd
    if initrd is None:
        return ["-kernel", str(image), "-append", BARE_KERNEL_LINE]
    line = f"{KERNEL_LINE} {launch.kernel.append}".rstrip()
    return ["-kernel", str(image), "-initrd", str(initrd), "-append", line]
