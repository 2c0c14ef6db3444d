"""What images hold: heads of file systems and disks, partition tables, fstabs, archives."""

from __future__ import annotations

import io
import struct
import tarfile
from importlib.util import find_spec
from pathlib import Path

from onecopy.images.create import file_system
from tests.fuzz.of_guests import archive
from tests.fuzz.readers import Reader, text


def _heads(data: bytes, folder: Path) -> None:
    (folder / "image").write_bytes(data)
    assert file_system(folder / "image") in ("erofs", "ext2", "ext4", "")


def _archives(data: bytes, folder: Path) -> None:
    from onecopy.images.tar_format import TarReader  # type: ignore[import-not-found,unused-ignore]
    from onecopy.images.unpack import unpack  # type: ignore[import-not-found,unused-ignore]

    (folder / "into").mkdir()
    unpack(TarReader(io.BytesIO(data), lambda *_: None), folder / "into")


def _fstabs(data: bytes, _: Path) -> None:
    from onecopy.images import fstab  # type: ignore[attr-defined,unused-ignore]

    for entry in fstab.parse_fstab(text(data)):
        fstab.find_partition(entry.device, [])
        str(entry)


def _head(at: int, magic: bytes) -> bytes:
    return bytes(at) + magic + bytes(2048)


def readers() -> list[Reader]:
    """All of them; the newer ones where they are there."""
    ext4 = bytes(1024 + 56) + struct.pack("<H", 0xEF53) + bytes(34) + struct.pack("<II", 4, 0x40)
    heads = [
        ext4.ljust(4096, b"\0"),
        _head(1024, struct.pack("<I", 0xE0F5E1E2)),
        b"QFI\xfb\0\0\0\3",
    ]
    found = [Reader("heads", _heads, heads, share=3)]
    if find_spec("onecopy.images.tar_format"):
        from onecopy.images.pax_header import BadMember

        forms = [archive(tarfile.PAX_FORMAT), archive(), archive(tarfile.USTAR_FORMAT)[:6000]]
        found.append(Reader("archives", _archives, forms, (BadMember, OSError), share=2))
    if find_spec("onecopy.images.fstab"):
        lines = [
            b"UUID=0a-1 / ext4 defaults 0 1\n/dev/sda2 /home\\040x btrfs subvol=@home 0 2\n",
            b"LABEL=a /var xfs rw\n# no\n/dev/sda3 none swap sw 0 0\n",
        ]
        found.append(Reader("fstabs", _fstabs, lines))
    return found
