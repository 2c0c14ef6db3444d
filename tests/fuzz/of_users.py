"""What users type: references, sizes, ports, and whole command lines."""

from __future__ import annotations

from pathlib import Path

import click

from onecopy import cli
from onecopy.cli.params import PublishType, SecondsType
from onecopy.guest.lifecycle.disks import DiskSpec
from onecopy.guest.machine import check_mountpoint
from onecopy.images.create import NewRange
from onecopy.model import Reference, check_guest_name, in_order, parse_mount, parse_size
from onecopy.store.access import check_domain, check_grant
from tests.fuzz.readers import Reader, text


def _references(data: bytes, _: Path) -> None:
    told = text(data)
    in_order(told)
    for read in (Reference.parse, parse_mount, check_guest_name, check_domain, check_grant):
        try:
            read(told)
        except Reader("", _references, ()).expected:
            continue
    check_mountpoint(told)


def _sizes(data: bytes, _: Path) -> None:
    told = text(data)
    DiskSpec.parse(told)
    NewRange.parse(told)
    assert 0 <= parse_size(told) < 1 << 63


def _ports(data: bytes, _: Path) -> None:
    host, guest = PublishType().convert(text(data), None, None)
    assert 0 <= host < 65536 and 0 < guest < 65536


def _seconds(data: bytes, _: Path) -> None:
    assert 0 <= SecondsType(0).convert(text(data), None, None) < 10**8


def _arguments(data: bytes, _: Path) -> None:
    name, *words = text(data).replace("\0", "").split("\x1f")
    group = click.Context(cli.onecopy)
    command = cli.onecopy.get_command(group, name if name in cli.COMMANDS else "run")
    assert command
    # Its help would be printed.
    words = [word for word in words if not word.startswith(("-h", "--h"))]
    command.make_context("onecopy", words, parent=group)


_LINES = [
    "run -n 3 --name web -p 8080:80 --memory 512M --cpus 2 --segment data:/srv --json web",
    "boot --command x --cpu host --timeout 300 --no-network --kernel /k --modules /m",
    "run --disk 1G:/data --disk /a/b.qcow2 --ksm all --bridge br0 --dry-run web -- sh -c true",
    "save web --root root:1 --segment a@sha256:abcdef --ready true --clone-hook command:x",
    "build a:1 --from debian:bookworm --include a,b --fs ext2 --class EW --free-space 64M",
    "create a --range SR:2M:/file --range SC:4M",
    "exec -i --timeout 5 web-1 -- cat /etc/hosts",
    "cp web-1:/a b",
    "stop a b c --timeout 1.5",
    "plan web --guests 100 --hosts 2 --memory 64G --work x --port 80",
    "rm a b:1 c@sha256:0123456789 --pending",
    "ksm on --pages 100 --sleep 20",
    "top --sort own --interval 3",
]


def readers() -> list[Reader]:
    """All of them."""
    references = [b"web", b"web:1.2", b"web@sha256:" + b"0a" * 32, b"data:/srv/x", b"data:1:/a"]
    return [
        Reader("references", _references, [*references, b"web-10", b"domain:lab-*"], share=12),
        Reader("sizes", _sizes, [b"256M", b"1G:/data", b"SR:2M:/file", b"65536", b"1GiB"]),
        Reader("ports", _ports, [b"80", b"8080:80", b"0:443"]),
        Reader("seconds", _seconds, [b"1", b"0.5", b"nan", b"inf", b"1e3"], (click.UsageError,)),
        Reader(
            "arguments",
            _arguments,
            [line.replace(" ", "\x1f").encode() for line in _LINES],
            (click.UsageError, click.exceptions.Exit),
            share=3,
        ),
    ]
