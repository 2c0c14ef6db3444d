"""The workloads: their content, and the commands before and after the system is saved.

Not here: the places (places.py), accepted differences (expected.py).
"""

from __future__ import annotations

import msgspec

from tests.vm.kept import SUITE, TEST_PACKAGES
from tests.workloads.places import MOUNTPOINT

#: Roots that are no Debian.
TREES = ("busybox", "musl")


class Root(msgspec.Struct, frozen=True):
    """A root segment: packages of a Debian suite, or one of TREES."""

    name: str
    suite: str
    packages: tuple[str, ...] = ()


class Workload(msgspec.Struct, frozen=True):
    """A workload in the root of one Debian suite."""

    name: str
    root: Root
    check: str
    """A shell command that prints TAP."""
    setup: str = ""
    """A shell command before the check; clones are saved after it."""
    memory: str = "256M"
    clones: int = 2
    chroot: bool = True
    """False for what wants a kernel of its own: the guests are compared with each other."""
    timeout: float = 1800
    """Seconds that a command may take."""

    @property
    def label(self) -> str:
        """What the table and the command line call it."""
        return f"{self.name}:{self.root.suite}"


def _program(name: str, *words: str, interpreter: str = "sh") -> str:
    return " ".join((interpreter, f"{MOUNTPOINT}/{name}", *words))


#: What script/test runs: modules of seconds, and of all kinds.
QUICK = (
    "test_shutil",
    "test_mmap",
    "test_fcntl",
    "test_select",
    "test_time",
    "test_thread",
)
#: Files, links, sockets, time, random numbers, processes, memory, threads.
WHOLE = (
    *QUICK,
    *("test_glob", "test_uuid", "test_fileio", "test_filecmp", "test_stat", "test_wait4"),
    "test_tempfile",
    "test_random",
    "test_posixpath",
    "test_os",
    "test_posix",
    "test_selectors",
    "test_pathlib",
    "test_file",
    "test_io",
    "test_largefile",
    "test_mailbox",
    "test_zipfile",
    "test_tarfile",
    "test_gzip",
    "test_bz2",
    "test_lzma",
    "test_dbm",
    "test_socket",
    "test_socketserver",
    "test_poll",
    "test_epoll",
    "test_asyncore",
    "test_asyncio.test_sock_lowlevel",
    "test_asyncio.test_streams",
    "test_asyncio.test_subprocess",
    "test_ftplib",
    "test_httpservers",
    "test_ssl",
    "test_secrets",
    "test_hashlib",
    "test_hmac",
    "test_datetime",
    "test_signal",
    "test_subprocess",
    "test_popen",
    "test_pty",
    "test_wait3",
    "test_fork1",
    "test_threading",
    "test_queue",
    "test_sched",
    "test_resource",
    "test_pwd",
    "test_grp",
    "test_openpty",
    "test_ioctl",
    "test_zlib",
    "test_shelve",
    "test_json",
    "test_struct",
    "test_array",
    "test_memoryview",
    "test_float",
    "test_math",
    "test_gc",
)


PYTHON = Root("python", SUITE, TEST_PACKAGES[SUITE])
SERVERS = Root("servers", "trixie", ("postgresql", "redis-server", "nginx-light"))
#: A system with what distributions run by the calendar.
AGED = Root("aged", "trixie", ("systemd-sysv", "dbus", "cron", "logrotate", "e2fsprogs"))
_PODMAN = ("podman", "crun", "busybox-static", "ca-certificates")


def cpython(modules: tuple[str, ...], clones: int = 1) -> Workload:
    """Modules of CPython's tests."""
    check = _program("cpython.py", *modules, interpreter="python3")
    return Workload("cpython", PYTHON, check, clones=clones, timeout=7200)


def _server(name: str, memory: str = "256M", clones: int = 2) -> Workload:
    check, setup = _program(f"{name}.sh", "check"), _program(f"{name}.sh", "setup")
    return Workload(name, SERVERS, check, setup, memory, clones)


def _systemd(suite: str) -> Workload:
    root = Root("systemd", suite, ("systemd-sysv", "dbus"))
    return Workload("systemd", root, _program("systemd.sh"), chroot=False)


WORKLOADS = (
    cpython(WHOLE),
    _server("postgresql", "512M", 4),
    _server("redis"),
    _server("nginx"),
    Workload(
        "node",
        Root("node", "bookworm", ("nodejs",)),
        _program("node.mjs", interpreter="node"),
        memory="512M",
    ),
    Workload(
        "java",
        Root("java", "bookworm", ("default-jdk-headless",)),
        _program("Check.java", interpreter="java"),
        memory="512M",
    ),
    *(
        Workload("tree", Root("tree", tree), _program("busybox.sh", interpreter="/bin/sh"))
        for tree in TREES
    ),
    *map(_systemd, ("bookworm", "trixie", "sid")),
    Workload(
        "podman",
        Root("podman", "trixie", _PODMAN),
        _program("podman.sh"),
        memory="768M",
        chroot=False,
    ),
)
