"""What seccomp filters return: the kernel's classic BPF, as far as filters go (linux/filter.h)."""

from __future__ import annotations

import ctypes
import os
import struct

X86_64 = 0xC000003E

_LOAD, _AND, _RETURN, _JUMP = 0x20, 0x54, 0x06, 0x05
_TESTS = {
    0x15: lambda a, k: a == k,
    0x25: lambda a, k: a > k,
    0x35: lambda a, k: a >= k,
    0x45: lambda a, k: a & k,
}
_SEIZE, _INTERRUPT, _DETACH, _GET_FILTER = 0x4206, 0x4207, 17, 0x420C
_WALL = 0x40000000


def decide(program: bytes, number: int, *arguments: int, arch: int = X86_64) -> int:
    """What a filter returns for a system call."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("=iIQ6Q", number, arch, 0, *(value & (1 << 64) - 1 for value in padded))
    operations = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = operations[at]
        at += 1
        if code == _LOAD:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == _AND:
            accumulator &= value
        elif code == _JUMP:
            at += value
        elif code in _TESTS:
            at += if_true if _TESTS[code](accumulator, value) else if_false
        else:
            assert code == _RETURN
            return int(value)


def seccomp_filters(pid: int) -> list[bytes]:
    """The filters of a process, the last one first (ptrace(2)); it takes CAP_SYS_ADMIN."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long

    def ptrace(request: int, at: int, data: ctypes.Array[ctypes.c_char] | None) -> int:
        done = libc.ptrace(ctypes.c_long(request), pid, ctypes.c_void_p(at), data)
        if done < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return int(done)

    ptrace(_SEIZE, 0, None)
    try:
        ptrace(_INTERRUPT, 0, None)
        os.waitpid(pid, _WALL)
        found: list[bytes] = []
        while True:
            try:
                count = ptrace(_GET_FILTER, len(found), None)
            except FileNotFoundError:
                return found
            data = ctypes.create_string_buffer(8 * count)
            ptrace(_GET_FILTER, len(found), data)
            found.append(data.raw)
    finally:
        ptrace(_DETACH, 0, None)
