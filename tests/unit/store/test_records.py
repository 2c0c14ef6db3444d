"""Records that somebody else wrote: whatever JSON they are, it is read or it is StoreDamaged."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import OnecopyError, StoreDamaged
from onecopy.guest.observe.inspect import describe_fully
from onecopy.model import Reference
from onecopy.store import Artifact, Store, oci
from onecopy.store.layout import Layout
from onecopy.store.lease import LeaseRecord
from tests.unit.store_kit import digest_of, put

_WORDS = ("", "app:1", "sha256:" + "0" * 64, "../../index.json", "\0", "org.onecopy.domain", "lab")
JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(allow_nan=False),
        st.sampled_from(_WORDS),
        st.text(max_size=10),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(_WORDS), st.text(max_size=5)), inner, max_size=3),
    ),
    max_leaves=8,
)
DESCRIPTORS = st.builds(
    oci.Descriptor,
    media_type=st.text(max_size=20),
    digest=st.binary(max_size=4).map(digest_of),
    size=st.integers(0, 1 << 60),
    annotations=st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3),
)


@given(kind=st.sampled_from(oci.KINDS), config=st.binary(max_size=20), layers=st.lists(DESCRIPTORS))
def test_a_manifest_is_read_back_as_it_was_written(
    kind: str, config: bytes, layers: list[oci.Descriptor]
) -> None:
    manifest = oci.manifest(kind, config, layers)
    data = oci.encode(manifest)
    assert oci.decode(data, oci.Manifest, Path("m"), "hint") == manifest
    links = oci.decode(data, oci.Links, Path("m"), "hint")
    assert (links.config, links.layers) == (manifest.config, manifest.layers)
    assert oci.encode(oci.manifest(kind, config, list(layers))) == data


@given(value=JSON)
@pytest.mark.parametrize("kind", [oci.Index, oci.Manifest, oci.Links, LeaseRecord, oci.LayoutMark])
def test_any_json_is_read_or_damage(kind: type[Any], value: Any) -> None:
    with contextlib.suppress(StoreDamaged):
        assert isinstance(oci.decode(json.dumps(value).encode(), kind, Path("f"), "hint"), kind)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Artifact]]:
    store = Store(tmp_path_factory.mktemp("store"))
    artifact = put(store)
    # What an index or manifest that was changed does not list may rightly be collected.
    with store.hold([artifact.digest], "keeper"):
        yield store, artifact


def _changed(document: Any, data: st.DataObject) -> Any:
    """``document`` with one of its values, at any depth, made another."""
    document = copy.deepcopy(document)
    inside = document
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = data.draw(st.sampled_from(keys))
        deeper = inside[key]
        if isinstance(deeper, dict | list) and deeper and data.draw(st.booleans()):
            inside = deeper
            continue
        if data.draw(st.booleans()):
            del inside[key]
        else:
            inside[key] = data.draw(JSON)
        return document


@given(data=st.data())
def test_a_changed_manifest_is_read_or_damage(
    made: tuple[Store, Artifact], data: st.DataObject
) -> None:
    store, artifact = made
    folder = Layout(store.root).blobs
    manifest = json.loads((folder / artifact.digest.removeprefix("sha256:")).read_bytes())
    text = json.dumps(_changed(manifest, data)).encode()
    (folder / digest_of(text).removeprefix("sha256:")).write_bytes(text)
    index = Layout(store.root).index
    before = index.read_bytes()
    entry = oci.index_entry("segment", Reference.parse("app:1"), text, "now")
    index.write_bytes(oci.encode(oci.Index(schema_version=2, manifests=(entry,))))
    try:
        _use(store)
    finally:
        index.write_bytes(before)
        (folder / digest_of(text).removeprefix("sha256:")).unlink(missing_ok=True)
        assert store.resolve(Reference.parse("app:1")) == artifact


@given(data=st.data())
def test_a_changed_index_is_read_or_damage(
    made: tuple[Store, Artifact], data: st.DataObject
) -> None:
    store, artifact = made
    index = Layout(store.root).index
    before = index.read_bytes()
    index.write_text(json.dumps(_changed(json.loads(before), data)))
    try:
        _use(store)
    finally:
        index.write_bytes(before)
        assert store.resolve(Reference.parse("app:1")) == artifact


def _use(store: Store) -> None:
    """Read all that there is, the way commands do."""
    for attempt in (
        lambda: [describe_fully(store, artifact) for artifact in store.artifacts()],
        lambda: list(map(store.verify, store.artifacts())),
        lambda: store.hold([artifact.digest for artifact in store.artifacts()], "web-1").close(),
        store.pending,
        store.leases,
        lambda: store.access("app"),
    ):
        with contextlib.suppress(OnecopyError):
            attempt()
