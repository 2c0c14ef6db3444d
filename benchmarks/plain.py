"""Plain guests: same root image, kernel, machine and application, the root as a virtio disk.

The same QEMU command line as onecopy's (vmm/argv.py), but for the segments. Not here: what is
measured (kinds.py).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from benchmarks.setup import Setup, resource
from onecopy.guest.ports import Ports
from onecopy.images.initramfs import cpio
from onecopy.images.kernel import KernelConfig
from onecopy.subprocesses import run
from onecopy.vmm.argv import FIRST_ADDRESS, Kernel, Launch, Nic, Ram
from onecopy.vmm.qemu_process import Vmm, launch, prepare

#: Boot modules that serve segments and the agent: a plain guest has neither.
_NOT_NEEDED = ("virtio_pmem", "nd_", "libnvdimm", "dax", "virtio_console")


def disk_module(setup: Setup) -> Path | None:
    """virtio_blk out of the kernel's modules, or None if it is built in.

    To be called before the host's memory is looked at: the first call reads all of the modules.
    """
    kept = setup.work / "virtio_blk.ko"
    if not kept.exists():
        image = setup.kernel.layer("modules").path
        with tempfile.TemporaryDirectory(dir=setup.work) as folder:
            tree = Path(folder) / "modules"
            run(["fsck.erofs", f"--extract={tree}", image])
            found = next(tree.glob("**/virtio_blk.ko"), None)
            kept.write_bytes(found.read_bytes() if found else b"")
    return kept if kept.stat().st_size else None


def start_plain(setup: Setup, name: str, command: str, publish: Ports) -> Vmm:
    """Start QEMU; the guest runs ``command``."""
    spec = new_plain(setup, name, publish)
    initrd = spec.folder / "initrd"
    _write_initrd(setup, initrd, name, command)
    kernel = Kernel(setup.kernel.layer("kernel").path, initrd)
    return launch_plain(setup, replace(spec, kernel=kernel))


def new_plain(setup: Setup, name: str, publish: Ports) -> Launch:
    """A run folder for a guest, and how QEMU is told to start it, but for what it boots."""
    folder = setup.work / name
    folder.mkdir()
    folder.chmod(0o711)
    prepare(folder)
    return Launch(
        binary=setup.host.qemu.binary,
        accel=setup.prepared.accel.name,
        name=name,
        folder=folder,
        monitor_fd="FD",
        console_fd="FD",
        ram=Ram.ANONYMOUS,
        # Nothing is mapped private, so QEMU need not ask for files (vmm/open_notify.py).
        rom=True,
        card=Nic("52:54:00:12:34:56", str(FIRST_ADDRESS)),
        publish=publish,
    )


def launch_plain(setup: Setup, spec: Launch) -> Vmm:
    """Start QEMU with the root image as its disk, and no segments."""
    hardware = replace(setup.prepared.hardware, segments=())
    with setup.image.open("rb") as image:
        # By descriptor: QEMU may be another user, and has no way to where it lies. Without locks,
        # for which it would open /dev/null (vmm/open_notify.py).
        file = f"/proc/self/fd/{image.fileno()},file.locking=off"
        drive = ("-drive", f"file={file},if=virtio,format=raw,readonly=on")
        return launch(hardware, replace(spec, extra=drive), inherit=[image.fileno()])


def _write_initrd(setup: Setup, out: Path, name: str, command: str) -> None:
    """The boot modules that onecopy's own guests get, virtio_blk, busybox and `init`."""
    names = _needed(KernelConfig.of(setup.kernel).modules)
    folder = out.with_name("initrd.d")
    for each in ("bench", "bin", "dev", "proc", "sys"):
        (folder / each).mkdir(parents=True)
    module = disk_module(setup)
    if module:
        shutil.copyfile(module, folder / "bench/virtio_blk.ko")
        names.append("bench/virtio_blk.ko")
    tools = setup.tools
    assert tools  # noqa: S101 - for the type checker: it is no bare machine
    shutil.copyfile(tools.layer("busybox").path, folder / "bin/busybox")
    (folder / "bin/busybox").chmod(0o755)
    (folder / "init").write_text(resource("init"))
    (folder / "init").chmod(0o755)
    (folder / "bench/modules").write_text("".join(f"{each}\n" for each in names))
    (folder / "bench/hostname").write_text(name + "\n")
    (folder / "bench/run").write_text(command)
    out.write_bytes(setup.kernel.layer("boot-modules").path.read_bytes() + cpio(folder))
    shutil.rmtree(folder)


def _needed(modules: Sequence[str]) -> list[str]:
    return [each for each in modules if not Path(each).name.startswith(_NOT_NEEDED)]
