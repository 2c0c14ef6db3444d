"""What hostile tests with real guests use: the fixtures of tests/vm.

Of hostile guests, VMMs, images and other users' processes each test shows that they get an error of
ours, within its deadline and limits, and that nothing is left.
"""

from tests.vm.conftest import (  # noqa: F401
    app,
    busybox_root,
    clones,
    cold,
    host,
    python_root,
    run_in,
    saved,
    static_root,
    systemd_root,
)
