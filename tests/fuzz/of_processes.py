"""What other people's processes make the kernel say: their names, command lines and mappings."""

from __future__ import annotations

from pathlib import Path

from onecopy.linux import process
from onecopy.linux.counters import meminfo, smaps
from onecopy.vmm import cmdline
from tests.fuzz.readers import Reader, text

_DATA = Path(__file__).parents[1] / "unit/data"
_PROC = _DATA / "6.12.117+deb12-cloud-amd64/proc"


def _command_lines(data: bytes, _: Path) -> None:
    argv = [text(arg) for arg in data.split(b"\0")]
    found = cmdline.parse(argv)
    assert found is None or found.ram_bytes >= 0


def _smaps(data: bytes, _: Path) -> None:
    for found in smaps.parse(data):
        # It makes lines of what the kernel writes: a path has no raw end of line.
        assert found.size is not None


def _stat(data: bytes, _: Path) -> None:
    # A process chooses its name, which stands in parentheses.
    process.parse_stat(b"7 (" + data + b") S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 99 0 0 0")


def _status(data: bytes, folder: Path) -> None:
    """A process that ends may leave any part of a text."""
    place = folder / "proc/7"
    place.mkdir(parents=True)
    (place / "status").write_bytes(data)
    (place / "cmdline").write_bytes(data)
    process.memory(7, folder)
    process.cmdline(7, folder)


def _meminfo(data: bytes, _: Path) -> None:
    meminfo.parse(data)


def readers() -> list[Reader]:
    """All of them."""
    lines = [path.read_bytes() for path in sorted((_DATA / "argv").glob("*.txt"))]
    # Of each line an option and its value.
    argvs = [line.replace(b"\n", b"\0").replace(b" ", b"\0") for line in lines]
    argvs += [
        b"qemu-kvm\0-name\0guest=a\0-m\0512\0-blockdev\0"
        b'{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}',
        b"kvm\0-m\0size=1G,slots=2\0-object\0memory-backend-file,id=ram,size=1G,mem-path=/a,,b",
        b'kvm\0-object\0{"qom-type":"memory-backend-ram","id":"pc.ram","size":536870912}\0-hda\0/a',
    ]
    return [
        Reader("command lines", _command_lines, argvs),
        Reader("smaps", _smaps, _pieces(_PROC / "1001/smaps"), (ValueError,), share=8),
        Reader("stat", _stat, [b"qemu-system-x86", b"a) S 1 2", b"(sd-pam)", b""]),
        Reader("status", _status, [(_PROC / "1001/status").read_bytes()], (ValueError,), share=2),
        Reader("meminfo", _meminfo, [(_PROC / "meminfo").read_bytes()], (ValueError,), share=8),
    ]


def _pieces(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[at : at + 4000] for at in range(0, min(len(data), 40000), 4000)]
