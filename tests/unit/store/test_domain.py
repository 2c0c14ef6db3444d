"""Trust domains: equal content of two of them is never one file."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import AlreadyExists, InvalidInput, NameConflict, OtherDomain, StoreDamaged
from onecopy.model import PAGE_SIZE, Reference
from onecopy.store import Access, Artifact, NewLayer, Store, domain, ingest
from onecopy.store.oci import Descriptor
from tests.unit.store_kit import PMEM, blobs, check_whole, digest_of

LAB, SHOP = Access(domain="lab"), Access(domain="shop")
CONTENT = b"image" * 2000


def put_in(
    store: Store, ref: str, access: Access | None, content: bytes = CONTENT, *reuse: Artifact
) -> Artifact:
    """Put one layer, and those of ``reuse`` by their digests, which the config names, too."""
    with store.workspace() as work:
        (work / "layer").write_bytes(content)
        layers = [NewLayer(work / "layer", PMEM, {"org.onecopy.role": "image"}, size=len(content))]
        held = [layer for artifact in reuse for layer in artifact.layers]
        layers += [NewLayer(None, PMEM, digest=each.digest, size=each.size) for each in held]
        config = b'["%s"]' % b'","'.join(each.digest.encode() for each in held)
        return store.put("segment", Reference.parse(ref), config, layers, access=access)


def test_the_blob_of_a_domain(tmp_path: Path) -> None:
    store = Store(tmp_path)
    layer = put_in(store, "app:1", LAB).layers[0]
    trailer = b"onecopy domain\0lab".ljust(PAGE_SIZE, b"\0")
    assert layer.path.read_bytes() == CONTENT + trailer
    assert layer.digest == digest_of(CONTENT + trailer)
    assert (layer.size, layer.blob_size, layer.domain) == (10000, 10000 + PAGE_SIZE, "lab")
    assert dict(layer.annotations) == {
        "org.onecopy.role": "image",
        "org.onecopy.domain": "lab",
        "org.onecopy.size": "10000",
    }
    store.verify(store.resolve(Reference.parse("app:1")))


def test_domains_share_no_file_and_one_domain_does(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = [
        put_in(store, "a:1", None),
        put_in(store, "b:1", LAB),
        put_in(store, "c:1", SHOP),
        put_in(store, "d:1", LAB),
    ]
    inodes = [artifact.layers[0].path.stat().st_ino for artifact in found]
    assert inodes[1] == inodes[3]
    assert len(set(inodes)) == 3
    assert found[1].digest == found[3].digest
    check_whole(tmp_path)


def test_a_name_keeps_its_domain(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put_in(store, "app:1", LAB)
    assert put_in(store, "app:2", None).layers[0].domain == "lab"
    for other in (SHOP, Access()):
        with pytest.raises(OtherDomain, match="lab"):
            put_in(store, "app:1", other, b"new")
    assert store.restrict("app", lambda _: Access()) == LAB
    assert store.access("app") == LAB
    assert check_whole(tmp_path).keys() == {"app:1", "app:2"}


def test_tag_into_another_domain_copies_and_back_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    source = put_in(store, "app:1", None)
    before = len(blobs(tmp_path))
    same = store.tag(Reference.parse("app:1"), Reference.parse("app:2"))
    assert (same.digest, len(blobs(tmp_path))) == (source.digest, before)
    copy = store.tag(Reference.parse("app:1"), Reference.parse("copy:1"), domain="lab")
    assert copy.layers[0].path.read_bytes()[:-PAGE_SIZE] == CONTENT
    assert copy.layers[0].path.stat().st_ino != source.layers[0].path.stat().st_ino
    assert store.access("copy") == LAB
    back = store.tag(Reference.parse("copy:1"), Reference.parse("back:1"), domain="")
    assert back.digest == source.digest
    for artifact in (source, copy, back):
        store.verify(artifact)
    with pytest.raises(OtherDomain):
        store.tag(Reference.parse("app:1"), Reference.parse("copy:2"), domain="shop")
    check_whole(tmp_path)


def test_what_a_record_says_of_copied_blobs_follows_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    segment = put_in(store, "root:1", None)
    system = put_in(store, "sys:1", None, b"ram", segment, segment)
    assert segment.layers[0].digest.encode() in system.config
    copy = store.tag(Reference.parse("sys:1"), Reference.parse("lab:1"), domain="lab")
    held = copy.layers[1].digest
    assert held == copy.layers[2].digest == put_in(store, "x:1", LAB).layers[0].digest
    assert copy.config == b'["%s","%s"]' % (held.encode(), held.encode())
    assert {layer.domain for layer in copy.layers} == {"lab"}
    check_whole(tmp_path)


def test_a_stored_blob_of_another_domain_is_copied_not_shared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    theirs = put_in(store, "theirs:1", SHOP)
    mine = put_in(store, "mine:1", LAB, b"ram", theirs)
    assert mine.layers[1].path.read_bytes() == CONTENT + domain.trailer("lab")
    open_ = put_in(store, "open:1", None, b"ram", theirs)
    assert open_.layers[1].path.read_bytes() == CONTENT
    check_whole(tmp_path)


@pytest.mark.parametrize("access", [None, LAB])
def test_nobody_makes_the_blob_of_another_domain(tmp_path: Path, access: Access | None) -> None:
    store = Store(tmp_path)
    forged = CONTENT + domain.trailer("shop")
    with pytest.raises(InvalidInput, match="trust domain"):
        put_in(store, "app:1", access, forged)
    assert digest_of(forged) not in blobs(tmp_path)
    put_in(store, "app:1", access, forged + bytes(PAGE_SIZE))


@given(content=st.binary(max_size=50), name=st.from_regex(r"[a-z0-9-]{0,20}", fullmatch=True))
def test_the_end_of_a_file_says_its_domain(content: bytes, name: str) -> None:
    fd = os.memfd_create("blob")
    try:
        os.write(fd, content + domain.trailer(name))
        assert domain.domain_of_file(fd) == name
    finally:
        os.close(fd)


@given(end=st.binary(max_size=40))
def test_any_end_is_of_the_domain_that_would_write_it(end: bytes) -> None:
    page = (b"onecopy domain\0" + end).ljust(PAGE_SIZE, b"\0")
    fd = os.memfd_create("blob")
    try:
        os.write(fd, page)
        found = domain.domain_of_file(fd)
        assert found == "" or domain.trailer(found) == page
        # No domain that there can be is overlooked.
        if end and set(end) <= set(b"abcdefghijklmnopqrstuvwxyz0123456789-"):
            assert found == end.decode()
    finally:
        os.close(fd)


def test_a_put_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put_in(store, "app:1", LAB, b"old")
    ref = Reference.parse("app:1")
    with store.workspace() as work:
        file = work / "file"
        file.write_bytes(CONTENT)
        for _ in range(2):
            with pytest.raises(AlreadyExists):
                store.put("segment", ref, b"{}", [NewLayer(file, PMEM)], replace=False)
            assert file.read_bytes() == CONTENT
        layer = store.put("segment", ref, b"{}", [NewLayer(file, PMEM)]).layers[0]
        assert layer.path.read_bytes() == CONTENT + domain.trailer("lab")


def test_a_copy_stays_sparse(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.workspace() as work:
        with (work / "ram").open("wb") as file:
            file.write(b"start")
            file.truncate(64 << 20)
            file.seek((32 << 20) + 5)
            file.write(b"middle")
        source = store.put("system", Reference("app"), b"{}", [NewLayer(work / "ram", PMEM)])
    copy = store.tag(Reference("app"), Reference("copy"), domain="lab").layers[0]
    assert copy.path.stat().st_blocks * 512 < 1 << 20
    with copy.path.open("rb") as mine, source.layers[0].path.open("rb") as theirs:
        assert mine.read(64 << 20) == theirs.read()


def test_verify_tells_a_blob_with_the_wrong_trailer(tmp_path: Path) -> None:
    """Another tool copied it: every digest is right, but the domain is not what it says."""
    store = Store(tmp_path)
    artifact = put_in(store, "app:1", LAB)
    raw = (tmp_path / "blobs/sha256" / artifact.digest.removeprefix("sha256:")).read_bytes()
    for old, new in ((b'"lab"', b'"sho"'), (b'"10000"', b'"10001"')):
        _rename_manifest(tmp_path, raw, raw.replace(old, new))
        with pytest.raises(StoreDamaged, match="trust domain"):
            store.verify(store.resolve(Reference.parse("app:1")))
        _rename_manifest(tmp_path, raw.replace(old, new), raw)
    store.verify(store.resolve(Reference.parse("app:1")))


def _rename_manifest(root: Path, old: bytes, new: bytes) -> None:
    (root / "blobs/sha256" / digest_of(new).removeprefix("sha256:")).write_bytes(new)
    index = root / "index.json"
    text = index.read_text().replace(digest_of(old), digest_of(new))
    index.write_text(text.replace(f'"size":{len(old)}', f'"size":{len(new)}'))


def test_a_name_that_went_while_its_new_version_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    put_in(store, "app:1", LAB)
    follow = ingest.replace_digests

    def remove_meanwhile(
        config: bytes, layers: Sequence[NewLayer], blobs: Sequence[Descriptor]
    ) -> bytes:
        Store(tmp_path).remove(Reference.parse("app:1"))
        return follow(config, layers, blobs)

    monkeypatch.setattr(ingest, "replace_digests", remove_meanwhile)
    with pytest.raises(NameConflict, match="app"):
        put_in(store, "app:2", None)
    assert check_whole(tmp_path) == {}
