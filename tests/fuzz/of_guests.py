"""What guests send: requests for segments, replies of the agent, archives for `cp`."""

from __future__ import annotations

import io
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from onecopy.errors import OnecopyError
from onecopy.guest.segments import protocol
from onecopy.guest.transfer.tar import Unpacker, Unusable
from tests.fuzz.readers import Reader


def _requests(data: bytes, _: Path) -> None:
    lines = protocol.Lines()
    for at in range(0, len(data), 700):
        for found in lines.feed(data[at : at + 700]):
            if isinstance(found, protocol.Request):
                assert found.line().count(b"\n") == 1
                answer = protocol.refusal(found.id, OnecopyError(" ".join(found.arguments)), ())
            else:
                answer = protocol.error(found.id, "invalid-input", 2, found.why)
            assert answer.endswith(b"\n") and len(answer) <= protocol.LIMIT


def _unpacked(data: bytes, folder: Path) -> None:
    target = folder / "target"
    unpacker = Unpacker(target)
    for at in range(0, len(data), 5000):
        unpacker.feed(data[at : at + 5000])
    unpacker.finish()


class _Status(msgspec.Struct):
    exited: bool
    exitcode: int = 0
    signal: int = 0


def _replies(data: bytes, _: Path) -> None:
    from onecopy.vmm import guest_reply  # type: ignore[attr-defined,unused-ignore]

    for form in (_Status, dict[str, int], list[dict[str, Any]]):
        try:
            value = guest_reply.read(data, form, "the reply")
        except OnecopyError:
            continue
        guest_reply.convert(value, dict, "the reply")
    assert guest_reply.shown(data).isprintable()
    assert 0 <= guest_reply.decimal(data, "it", most=10**6) <= 10**6
    guest_reply.address(data, "it")


def archive(form: int = tarfile.GNU_FORMAT) -> bytes:
    """A folder with a file, links, a long name and a folder."""
    out, long = io.BytesIO(), "top/" + "n" * (90 if form == tarfile.USTAR_FORMAT else 150)
    with tarfile.open(fileobj=out, mode="w", format=form) as made:
        for name, kind, link in (
            *(("top", tarfile.DIRTYPE, ""), ("top/file", tarfile.REGTYPE, "")),
            *(("top/link", tarfile.SYMTYPE, "file"), ("top/hard", tarfile.LNKTYPE, "top/file")),
            *((long, tarfile.REGTYPE, ""), ("top/deep", tarfile.DIRTYPE, "")),
            ("top/deep/x", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, link, 0o755
            info.mtime = 10**9
            if form == tarfile.PAX_FORMAT and kind == tarfile.REGTYPE:
                info.pax_headers = {"SCHILY.xattr.user.a": "b", "mtime": "1000000000.5"}
            info.size = 700 if kind == tarfile.REGTYPE else 0
            made.addfile(info, io.BytesIO(b"c" * 700))
    return out.getvalue()


def readers() -> list[Reader]:
    """All of them; those of replies where there is such a reader."""
    lines = [
        b"1f load app - shared\n2 list\n",
        b"0a loaded app /srv\n0b unload app\n",
        b"9 find x\n",
    ]
    found = [
        Reader("requests", _requests, lines, share=12),
        Reader("cp", _unpacked, [archive()], (Unusable, OSError), share=2),
    ]
    if find_spec("onecopy.vmm.guest_reply"):
        replies = [
            b'{"exited":true,"exitcode":1}',
            b'{"return":{"pid":12}}',
            b'[{"name":"eth0","ip-addresses":[{"ip-address":"198.18.1.2","prefix":15}]}]',
            b"198.18.1.2\n",
            b"1234567890123",
        ]
        found.append(Reader("replies", _replies, replies, share=12))
    return found
