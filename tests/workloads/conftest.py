"""The fixtures of tests/vm, for workloads."""

from tests.vm.conftest import (  # noqa: F401
    boot,
    busybox_root,
    guests,
    host,
    python_root,
    run_in,
    saved,
    static_root,
    systemd_root,
)
