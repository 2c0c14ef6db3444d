"""Run a reader: a guest of onecopy's own that mounts what the host's kernel must not mount.

It has no network. It has a disk image, an overlay for writes, its modules and two ports. It is
confined, limited and ended like any tool (confined_tool.py).

Not here: the protocol at the ports, and the programs in the reader (images/disk_reader.py).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from onecopy.linux.sandbox.landlock import IOCTL_DEV
from onecopy.model import MIB
from onecopy.vmm.argv import accelerator
from onecopy.vmm.confined_tool import Limits, Task, Tool, named, running
from onecopy.vmm.cpu import DEFAULT, qemu_cpu
from onecopy.vmm.passed_files import READ, WRITE
from onecopy.vmm.qemu import Qemu
from onecopy.vmm.tcg import kernel_words
from onecopy.vmm.vmm_user import KVM

_MEMORY = 512 * MIB
#: The limit in seconds, for elapsed time and for CPU time.
_SECONDS = 24 * 3600
#: Bytes of the overlay, into which a journal is replayed.
_OVERLAY = 16 << 30
_LINE = "console=ttyS0 quiet loglevel=3 panic=-1 swiotlb=noforce tsc=reliable nowatchdog"


class Disk(msgspec.Struct, frozen=True):
    """An open disk image for a reader."""

    fd: int
    """Open for reading."""
    form: str
    """The name of QEMU's driver."""
    overlay: int
    """An empty qcow2 image of the same size, open for writing."""


class Parts(msgspec.Struct, frozen=True):
    """The components of a reader."""

    qemu: Qemu
    accel: str
    kernel: Path
    initrd: Path
    modules: Path
    """An EROFS image of the kernel's modules."""


class Running(msgspec.Struct, frozen=True):
    """A running reader, and this process's ends of its two ports."""

    tool: Tool
    control: socket.socket
    data: socket.socket


@contextmanager
def reading(parts: Parts, disk: Disk) -> Iterator[Running]:
    """Start a reader that ends with the context.

    Raises:
        MissingProgram: QEMU is not installed.
        Incompatible: this host cannot confine it.
        OSError: a file cannot be opened.
    """
    with ExitStack() as ends:
        control, its_control = _socket_pair(ends)
        data, its_data = _socket_pair(ends)
        files = [_open(ends, path) for path in (parts.kernel, parts.initrd, parts.modules)]
        rights = dict.fromkeys((*files, disk.fd, its_control.fileno(), its_data.fileno()), READ)
        rights[disk.overlay] = WRITE
        if parts.accel == "kvm":
            kvm = os.open(KVM, os.O_PATH | os.O_CLOEXEC)
            ends.callback(os.close, kvm)
            rights[kvm] = WRITE | IOCTL_DEV
        ports = {"control": its_control.fileno(), "data": its_data.fileno()}
        size = os.fstat(files[2]).st_size
        names = [named(fd) for fd in files]
        task = Task(
            [*_machine(parts, size), *_files(parts, size, names), *_disk(disk), *_ports(ports)],
            rights,
            kvm=parts.accel == "kvm",
            limits=Limits(
                seconds=_SECONDS,
                memory=4 << 30,
                file_size=_OVERLAY,
                processes=128,
                files=256,
            ),
        )
        tool = ends.enter_context(running(task))
        # Without these copies, the end of QEMU is the end of our input.
        its_control.close()
        its_data.close()
        yield Running(tool, control, data)


def _socket_pair(ends: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, its = socket.socketpair()
    ends.enter_context(ours)
    ends.enter_context(its)
    ours.setblocking(False)
    return ours, its


def _open(ends: ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    ends.callback(os.close, fd)
    return fd


def _machine(parts: Parts, modules: int) -> list[str]:
    options = "hpet=off,vmport=off,smm=off,smbus=off,sata=off,usb=off,i8042=off,graphics=off"
    ceiling = _MEMORY + modules + 1024 * MIB
    return [
        *(parts.qemu.binary, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-machine", f"{parts.qemu.machine},{options}", "-accel", accelerator(parts.accel)),
        *("-cpu", _cpu(parts), "-smp", "2"),
        *("-m", f"size={_MEMORY}B,slots=1,maxmem={ceiling}B", "-serial", "stdio"),
    ]


def _cpu(parts: Parts) -> str:
    return qemu_cpu("host" if parts.accel == "kvm" else DEFAULT, parts.accel)


def _files(parts: Parts, size: int, names: Sequence[str]) -> list[str]:
    kernel, initrd, modules = names
    line = f"{_LINE} {kernel_words(parts.accel, parts.qemu.version, _cpu(parts))}".rstrip()
    backend = f"memory-backend-file,id=modules,size={size},mem-path={modules},share=on,readonly=on"
    return [
        *("-kernel", kernel, "-initrd", initrd, "-append", line),
        *("-object", backend, "-device", "virtio-pmem-pci,memdev=modules"),
    ]


def _disk(disk: Disk) -> list[str]:
    # QEMU duplicates our descriptors, because it may not be permitted to open the image.
    image = {"driver": "file", "filename": "/dev/fdset/1", "locking": "off"}
    base: dict[str, object] = {"node-name": "image", "read-only": True, "driver": disk.form}
    base["file"] = {**image, "read-only": True}
    if disk.form in ("qcow2", "qed", "vmdk"):
        base["backing"] = None
    over = {
        "node-name": "disk",
        "driver": "qcow2",
        "file": {**image, "filename": "/dev/fdset/2"},
        "backing": "image",
    }
    return [
        *("-add-fd", f"fd={disk.fd},set=1", "-add-fd", f"fd={disk.overlay},set=2"),
        *("-blockdev", json.dumps(base), "-blockdev", json.dumps(over)),
        *("-device", "virtio-blk-pci,drive=disk,werror=report,rerror=report"),
    ]


def _ports(ports: dict[str, int]) -> list[str]:
    argv = ["-device", "virtio-serial-pci,id=serial"]
    for number, (name, fd) in enumerate(ports.items(), start=1):
        port = f"virtserialport,bus=serial.0,nr={number},chardev={name},name=org.onecopy.{name}"
        argv += ["-chardev", f"socket,id={name},fd={fd}", "-device", port]
    return argv
