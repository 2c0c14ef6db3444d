"""Mounts that nobody else sees: of a file system of our own making, or of a folder over itself.

The former is mounted nowhere: a descriptor is all there is of it, and it ends with that (fsopen(2),
fsmount(2), Linux 5.2; loop(4), Linux 5.8). Not for images that others have made: those are no
business of the host's kernel.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from onecopy.linux.syscall import buffer, syscall, unshare_mounts

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_MOVE_MOUNT, _EMPTY_PATHS = 429, 0x44
_SET_STRING, _CREATE, _CLOEXEC = 1, 6, 1
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
# linux/loop.h: struct loop_config is the file, a block size, and struct loop_info64, of which we
# set the flags, at offset 52.
_GET_FREE, _CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C0A, 4
_CONFIG = struct.Struct("<II52xI176x64x")
_TRIES = 64


def mount_over(mounts: Mapping[int, Path]) -> None:
    """Let this thread have open mounts in place of the folders that they are of.

    Nobody else sees them there. Raises OSError.
    """
    unshare_mounts()
    for mount, path in mounts.items():
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not os.path.sameopenfile(mount, folder):
                raise OSError(errno.ESTALE, "another folder has its name now")
            syscall(_MOVE_MOUNT, mount, _text(""), folder, _text(""), _EMPTY_PATHS)
        finally:
            os.close(folder)


@contextmanager
def mounted(file: int, kinds: tuple[str, ...]) -> Iterator[int]:
    """The root folder of the image that is open as ``file``, of the first of ``kinds`` there is.

    Raises OSError.
    """
    device = _attach(file)
    try:
        root = _mount(f"/dev/loop{device[1]}", kinds)
    finally:
        # The mount holds it; else it is free again.
        os.close(device[0])
    try:
        yield root
    finally:
        os.close(root)


def _attach(file: int) -> tuple[int, int]:
    """A loop device of the file, open, and its number; it goes when nobody has it open."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, _GET_FREE)
            fd = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _CONFIGURE, _CONFIG.pack(file, 0, _AUTOCLEAR))
            except OSError as error:
                os.close(fd)
                # Somebody else was faster.
                if error.errno != errno.EBUSY:
                    raise
                continue
            return fd, number
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free")


def _mount(device: str, kinds: tuple[str, ...]) -> int:
    for kind in kinds:
        try:
            context = syscall(_FSOPEN, _text(kind), _CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENODEV and kind != kinds[-1]:
                continue
            raise
        try:
            syscall(_FSCONFIG, context, _SET_STRING, _text("source"), _text(device), 0)
            syscall(_FSCONFIG, context, _CREATE, None, None, 0)
            return syscall(_FSMOUNT, context, _CLOEXEC, _NOSUID | _NODEV | _NOEXEC)
        finally:
            os.close(context)
    raise OSError(errno.ENODEV, "no file system is named")


def _text(text: str) -> ctypes.Array[ctypes.c_char]:
    return buffer(os.fsencode(text) + b"\0")
