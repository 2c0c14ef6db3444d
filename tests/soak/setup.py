"""A host of the soak's own: a copy of the kept store, and a saved system that answers HTTP."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onecopy
from onecopy.guest.runtime import Runtime
from onecopy.images.build import build_segment
from onecopy.model import Reference
from onecopy.vmm import fork_registry
from tests.soak.campaign import BASE
from tests.vm.conftest import APP
from tests.vm.kept import PYTHON_ROOT, kept_store


@contextmanager
def soaked(folder: Path) -> Iterator[Runtime]:
    """The host, in ``folder``, which ONECOPY_HOME names for the commands; it goes at the end."""
    with kept_store((PYTHON_ROOT,)) as kept:
        kept.copy(folder)
    host = Runtime.open(folder)
    try:
        with host.store.workspace() as work:
            (work / "app.py").write_text(APP)
            build_segment(host.store, Reference("app"), f"dir:{work}")
        with onecopy.Host(folder) as face:
            face.save(
                BASE,
                str(PYTHON_ROOT),
                segments=["app:/srv/app"],
                memory="128M",
                command="exec python3 /srv/app/app.py",
                ready="wget -q -O /dev/null http://127.0.0.1/",
            )
        # ext4 takes blocks for its own records only when it writes a file back.
        os.sync()
        yield host
    finally:
        host.sweep()
        host.end(*host.guests())
        fork_registry.end(host.run.name)
        shutil.rmtree(host.run)
        shutil.rmtree(folder)
