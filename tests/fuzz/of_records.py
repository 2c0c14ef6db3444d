"""What lies on disk where others can write: the store's records, leases, run folders."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from onecopy.errors import OnecopyError
from onecopy.guest.machine import SystemConfig
from onecopy.guest.run_directory import RunDirectory
from onecopy.images.kernel import KernelConfig
from onecopy.images.range_record import Range, SegmentConfig
from onecopy.model import PageClass, Reference
from onecopy.store import Artifact, Store, access, lease, names, oci
from onecopy.store.layout import Layout
from onecopy.store.lease import LeaseRecord
from tests.fuzz.readers import Reader
from tests.unit.guest_kit import record

_DIGEST = "sha256:" + "ab" * 32
_HINT = "hint"


def _index(data: bytes, folder: Path) -> None:
    index = oci.decode(data, oci.Index, folder, _HINT)
    for entry in names.ours(index):
        access.of(index, entry.ref.partition(":")[0])
        assert names.find(index, Reference.parse(entry.ref))
    oci.encode(access.prune(index))


def _manifest(data: bytes, folder: Path) -> None:
    oci.decode(data, oci.Links, folder, _HINT)
    oci.encode(oci.decode(data, oci.Manifest, folder, _HINT))


def _configs(data: bytes, _: Path) -> None:
    artifact = Artifact("segment", "a", "1", _DIGEST, "", data, ())
    for kind in (SegmentConfig, SystemConfig, KernelConfig):
        try:
            kind.of(artifact)
        except OnecopyError:
            continue


def _store(data: bytes, folder: Path) -> None:
    """All that reads an index, and a change of it."""
    store = Store(folder / "store")
    (folder / "store/index.json").write_bytes(data)
    Store(folder / "store")
    for artifact in store.artifacts():
        store.remove(Reference.parse(artifact.ref))
    store.pending()


def _leases(data: bytes, folder: Path) -> None:
    layout = Layout(folder)
    layout.leases.mkdir()
    path = layout.leases / "web-1.json"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        lease.scan(layout)
    finally:
        os.close(fd)


def _run_folders(data: bytes, folder: Path) -> None:
    for name in ("guest.json", "prepared.json", "system.json"):
        (folder / name).write_bytes(data)
    RunDirectory(folder).prepared()
    try:
        SystemConfig.read(folder)
    except OnecopyError:
        RunDirectory(folder).record()


def _samples() -> dict[str, list[bytes]]:
    config = SegmentConfig(ranges=(Range(PageClass.SR, 2 << 20, "erofs"),), source="dir").encode()
    manifest = oci.encode(oci.manifest("segment", config, ()))
    entry = oci.index_entry("segment", Reference("web", "1"), manifest, "2026-01-01T00:00:00Z")
    index = names.bind(oci.EMPTY_INDEX, entry)
    index = access.bind(index, "web", access.Access(restricted=True, grants=("a-*", "domain:b")))
    held = LeaseRecord(holder="web-1", digests=(_DIGEST,), blobs=(_DIGEST,), names={_DIGEST: "a:1"})
    system = SystemConfig(
        machine="pc-q35-7.2",
        cpu="max",
        cpus=1,
        memory=1 << 28,
        network=True,
        accel="tcg",
        qemu="7.2",
        kernel="6.1",
        root="a:1",
        command=None,
        machine_id=True,
        segments=(),
    )
    kernel = KernelConfig(release="6.1", modules=("a.ko",))
    return {
        "index": [oci.encode(index), oci.encode(oci.EMPTY_INDEX)],
        "manifest": [manifest],
        "configs": [config, msgspec.json.encode(system), msgspec.json.encode(kernel)],
        "leases": [oci.encode(held)],
        "run folders": [
            msgspec.json.encode(record("web-1", publish=((1, 2),))),
            msgspec.json.encode(system),
        ],
    }


def readers() -> list[Reader]:
    """All of them."""
    samples = _samples()
    return [
        Reader("index", _index, samples["index"]),
        Reader("manifest", _manifest, samples["manifest"]),
        Reader("configs", _configs, samples["configs"]),
        Reader("store", _store, samples["index"], share=1),
        Reader("leases", _leases, samples["leases"], share=3),
        Reader("run folders", _run_folders, samples["run folders"], share=1),
    ]
