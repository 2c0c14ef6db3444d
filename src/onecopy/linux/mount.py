"""Private mounts: of a file system image that onecopy made, or over a directory.

An image is mounted without a path. Only the descriptor of its root refers to the mount, which ends
with that descriptor (fsopen(2), fsmount(2), Linux 5.2; loop(4), Linux 5.8).

Not here: images made by others, which the host's kernel must never mount.
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
# linux/loop.h: struct loop_config has the file, a block size, and struct loop_info64, of which this
# sets the flags at offset 52.
_GET_FREE, _CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C0A, 4
_CONFIG = struct.Struct("<II52xI176x64x")
_TRIES = 64


def mount_over(mounts: Mapping[int, Path]) -> None:
    """Attach open mounts over the directories that they were opened from, for this thread only.

    Raises:
        OSError: a mount failed or a directory was replaced.
    """
    unshare_mounts()
    for mount, path in mounts.items():
        directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not os.path.sameopenfile(mount, directory):
                raise OSError(errno.ESTALE, "the directory was replaced")
            syscall(_MOVE_MOUNT, mount, _c_string(""), directory, _c_string(""), _EMPTY_PATHS)
        finally:
            os.close(directory)


@contextmanager
def mounted(file: int, kinds: tuple[str, ...]) -> Iterator[int]:
    """Mount a file system image and yield a descriptor of its root directory.

    Args:
        file: a descriptor of the image.
        kinds: types of file system, of which the first that the kernel supports is used.

    Raises:
        OSError: the image cannot be mounted.
    """
    device = _attach(file)
    try:
        root = _mount(f"/dev/loop{device[1]}", kinds)
    finally:
        # The mount keeps the device; without a mount it becomes free.
        os.close(device[0])
    try:
        yield root
    finally:
        os.close(root)


def _attach(file: int) -> tuple[int, int]:
    """Attach the file to a loop device; return its descriptor and number.

    The device detaches when its last user closes it."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, _GET_FREE)
            fd = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _CONFIGURE, _CONFIG.pack(file, 0, _AUTOCLEAR))
            except OSError as error:
                os.close(fd)
                # Another process took the device first.
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
            context = syscall(_FSOPEN, _c_string(kind), _CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENODEV and kind != kinds[-1]:
                continue
            raise
        try:
            syscall(_FSCONFIG, context, _SET_STRING, _c_string("source"), _c_string(device), 0)
            syscall(_FSCONFIG, context, _CREATE, None, None, 0)
            return syscall(_FSMOUNT, context, _CLOEXEC, _NOSUID | _NODEV | _NOEXEC)
        finally:
            os.close(context)
    raise OSError(errno.ENODEV, "no file system type was given")


def _c_string(text: str) -> ctypes.Array[ctypes.c_char]:
    return buffer(os.fsencode(text) + b"\0")
