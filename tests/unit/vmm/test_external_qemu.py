"""QEMU processes of others: found in /proc, and understood by their command lines alone."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from onecopy.guest.observe.accounts import vmm_maps
from onecopy.model import MIB
from onecopy.sharing import report
from onecopy.vmm import cmdline, external_qemu
from onecopy.vmm.cmdline import QemuOptions
from tests.conftest import cannot_run

LIBVIRT_RAM = json.dumps({"qom-type": "memory-backend-ram", "id": "pc.ram", "size": 512 * MIB})


def parse(*argv: str) -> QemuOptions:
    found = cmdline.parse(["qemu-system-x86_64", *argv])
    assert found
    return found


def test_nothing_said() -> None:
    assert parse() == QemuOptions("", 128 * MIB, None, {})


def test_a_probe_and_a_process_that_ends_are_no_guests() -> None:
    assert cmdline.parse(["qemu-system-x86_64", "-M", "none"]) is None
    assert cmdline.parse(["qemu-system-x86_64", "-machine", "type=none,accel=tcg"]) is None
    assert cmdline.parse([]) is None


@pytest.mark.parametrize(
    ("value", "size"),
    [("512", 512), ("1G", 1024), ("size=2048M,slots=2,maxmem=8G", 2048), ("slots=2", 128)],
)
def test_sizes_of_ram(value: str, size: int) -> None:
    assert parse("-m", value).ram_bytes == size * MIB


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("web", "web"),
        ("guest=web,debug-threads=on", "web"),
        ("debug-threads=on", ""),
        ("a,,b", "a,b"),
    ],
)
def test_names(value: str, name: str) -> None:
    assert parse("-name", value).name == name


def test_ram_from_a_file_and_a_persistent_memory_beside_it() -> None:
    found = parse(
        *("-machine", "q35,memory-backend=ram"),
        *("-object", "memory-backend-file,id=ram,size=1G,mem-path=/a,,b,share=off"),
        *("-object", "memory-backend-file,id=nv,size=1G,mem-path=/nv"),
        *("-object", "rng-random,id=rng"),
        *("-m", "1G"),
    )
    assert (found.ram_path, found.files) == ("/a,b", {"/nv": "nv"})


def test_libvirts_way() -> None:
    found = parse("-machine", "pc,memory-backend=pc.ram", "-object", LIBVIRT_RAM, "-m", "512")
    assert (found.ram_path, found.files, found.ram_bytes) == (None, {}, 512 * MIB)


def test_numa_nodes_and_a_folder_of_huge_pages() -> None:
    backend = "memory-backend-file,size=64M,mem-path="
    found = parse(
        *("-object", f"{backend}/one,id=m0", "-object", f"{backend}/two,id=m1"),
        *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1"),
    )
    # Two files: an account knows of one.
    assert (found.ram_path, found.files) == (None, {})
    assert parse("-mem-path", "/dev/hugepages").ram_path == "/dev/hugepages"


@pytest.mark.parametrize(
    ("argv", "disks"),
    [
        (["-hda", "/a", "-cdrom", "/b"], ("/a", "/b")),
        (["-drive", "file=/a,if=virtio,format=raw", "-drive", "/b"], ("/a", "/b")),
        (["-drive", "file.driver=file,file.filename=/a"], ("/a",)),
        (["-blockdev", "driver=file,node-name=n,filename=/a"], ("/a",)),
        (["-blockdev", '{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}'], ("/a",)),
        (["-blockdev", '{"driver":"qcow2","node-name":"n","file":"other"}'], ()),
        (["-drive", "if=none,id=d", "-drive", "file=/a", "-drive", "file=/a"], ("/a",)),
    ],
)
def test_disks(argv: list[str], disks: tuple[str, ...]) -> None:
    assert parse(*argv).disks == disks


def test_a_real_one_is_found_and_accounted(tmp_path: Path) -> None:
    ram, extra = tmp_path / "ram", tmp_path / "extra"
    for path in (ram, extra):
        path.write_bytes(b"")
        os.truncate(path, 64 * MIB)
    (tmp_path / "link").symlink_to(extra)
    (tmp_path / "disk").write_bytes(bytes(MIB))
    disk = os.open(tmp_path / "disk", os.O_RDONLY)
    argv = [
        *("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-name", "theirs"),
        *("-machine", "q35,accel=tcg,memory-backend=ram,nvdimm=on"),
        *("-m", "64M,slots=1,maxmem=1G"),
        *("-object", "memory-backend-file,id=ram,size=64M,mem-path=ram,share=off"),
        *("-object", "memory-backend-file,id=nv,size=64M,mem-path=link,share=on"),
        *("-device", "nvdimm,id=d,memdev=nv"),
        *("-drive", f"file=/proc/self/fd/{disk},if=virtio,format=raw,readonly=on"),
    ]
    try:
        process = subprocess.Popen(argv, cwd=tmp_path, pass_fds=[disk])
    except FileNotFoundError:
        cannot_run("qemu-system-x86_64 is not installed")
    finally:
        os.close(disk)
    with process:
        try:
            until = time.monotonic() + 60
            while str(extra) not in Path(f"/proc/{process.pid}/maps").read_text():
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            (vmm,) = (each for each in external_qemu.find(()).vmms if each.pid == process.pid)
            assert vmm.disks == (str(tmp_path / "disk"),)
            assert set(vmm.regular) == {str(tmp_path / "disk"), str(ram), str(extra)}
            maps = vmm_maps(vmm)
            assert maps.segments == {str(extra): "nv"}
            assert (maps.name, maps.ram_path, maps.ram_bytes) == ("theirs", str(ram), 64 * MIB)
            assert process.pid not in {each.pid for each in external_qemu.find({process.pid}).vmms}
            found = report.collect([], [maps])
        finally:
            process.kill()
    (account,) = found.others
    assert account.note == "" and account.ram_private is not None
    assert account.segments_mapped == 64 * MIB
    assert {blob.path for blob in found.blobs} == {str(ram), str(extra)}
    assert found.guests == ()
