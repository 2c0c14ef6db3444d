"""What hostile tests with real guests use: the fixtures of tests/vm.

Of hostile guests, VMMs, images and other users' processes each test shows that they get an error of
ours, within its deadline and limits, and that nothing is left.
"""

import os

import pytest

import tests.hypothesis_settings  # noqa: F401
from onecopy.linux.syscall import unshare_mounts
from tests.vm.conftest import (  # noqa: F401
    app,
    boot,
    busybox_root,
    clones,
    guests,
    host,
    minimal,
    python_root,
    run_in,
    saved,
    static_root,
    systemd_root,
)


@pytest.fixture(scope="session", autouse=True)
def mounts_of_their_own() -> None:
    """Full disks and the like are mounted for these tests alone: others run beside them."""
    if os.geteuid() == 0:
        unshare_mounts()
