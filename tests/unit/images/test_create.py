"""Segments of ranges: what can be, what cannot, and that what is stored is what was given."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import BadSource, InsufficientResources, InvalidInput, StoreDamaged
from onecopy.images.create import NewRange, create_segment, file_system
from onecopy.images.range_record import MAX_RANGES, Range, SegmentConfig, check, role
from onecopy.model import HUGE_PAGE_SIZE, PageClass, Reference
from onecopy.store import Access, Store

REF = Reference("multi")
SIZE = HUGE_PAGE_SIZE


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def empty(store: Store) -> bool:
    return not list(store.root.glob("blobs/sha256/*")) and not list(store.root.glob("tmp/*"))


def test_ranges_are_stored_as_given(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"content")
    ranges = [NewRange(each, SIZE, tmp_path / "data" if each.saved else None) for each in PageClass]
    made = create_segment(store, REF, ranges)
    config = SegmentConfig.of(made)
    assert [item.page_class for item in config.ranges] == list(PageClass)
    for number, item in enumerate(config.ranges):
        if item.page_class.saved:
            layer = made.layer(role(number))
            data = layer.path.read_bytes()
            assert (data[:7], len(data), layer.size) == (b"content", SIZE, SIZE)
            assert not data[7:].strip(b"\0")
            # Zeroes take no room.
            assert layer.path.stat().st_blocks * 512 < SIZE
    store.verify(made)
    # The same ranges, the same digest; in another trust domain another one.
    assert create_segment(store, Reference("again"), ranges).digest == made.digest
    blue = create_segment(store, Reference("blue"), ranges, access=Access(domain="blue"))
    assert blue.digest != made.digest
    assert not {layer.digest for layer in blue.layers} & {layer.digest for layer in made.layers}


def test_zeroes_in_two_domains_are_two_segments(store: Store) -> None:
    """They have no bytes, but guests share what has a segment's digest."""
    ranges = [NewRange(PageClass.SN, SIZE)]
    first = create_segment(store, REF, ranges)
    second = create_segment(store, Reference("blue"), ranges, access=Access(domain="blue"))
    assert first.digest != second.digest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("XX:2M", "not a page class"),
        ("2M", "not a page class"),
        ("SR", "is not a valid size"),
        ("SR:lots", "is not a valid size"),
        ("SR:0", "is empty"),
        ("SR:3M", "not a multiple of 2 MiB"),
        ("SN:2M:FILE", "no stored content"),
        ("EN:2M:FILE", "no stored content"),
        ("EW:2M:EROFS", "EROFS is read-only"),
        ("SW:4M:EXT2", "guests that write to one copy"),
    ],
)
def test_what_cannot_be(store: Store, images: dict[str, Path], text: str, says: str) -> None:
    for key, path in images.items():
        text = text.replace(key, str(path))
    with pytest.raises(InvalidInput, match=says) as refused:
        create_segment(store, REF, [NewRange.parse(text)])
    assert refused.value.hint
    assert empty(store)


@pytest.mark.parametrize(
    ("text", "says"), [("SR:2M:BIG", "but range 0 has only"), ("SR:2M:NONE", "not a regular file")]
)
def test_what_cannot_be_read(
    store: Store, images: dict[str, Path], tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "big").write_bytes(bytes(SIZE + 1))
    text = text.replace("BIG", str(tmp_path / "big")).replace("NONE", str(tmp_path))
    with pytest.raises(BadSource, match=says):
        create_segment(store, REF, [NewRange.parse(text)])
    assert empty(store)


def test_too_many_and_none(store: Store) -> None:
    for ranges in ([], [NewRange(PageClass.SR, SIZE)] * (MAX_RANGES + 1)):
        with pytest.raises(InvalidInput):
            create_segment(store, REF, ranges)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """Real images: EROFS, EXT2, EXT4; and FILE, plain data."""
    found = {name: tmp_path / name for name in ("EROFS", "EXT2", "EXT4", "FILE")}
    (tmp_path / "tree").mkdir()
    found["FILE"].write_bytes(b"plain data")
    quiet = {"check": True, "capture_output": True}
    subprocess.run(["mkfs.erofs", found["EROFS"], tmp_path / "tree"], **quiet)  # type: ignore[call-overload]
    for name in ("EXT2", "EXT4"):
        command = ["mke2fs", "-q", "-F", "-t", name.lower(), found[name], "4M"]
        subprocess.run(command, **quiet)  # type: ignore[call-overload]
    return found


def test_file_systems_are_told(images: dict[str, Path]) -> None:
    told = {name: file_system(path) for name, path in images.items()}
    assert told == {"EROFS": "erofs", "EXT2": "ext2", "EXT4": "ext4", "FILE": ""}


def test_a_disk_that_is_too_small(store: Store, tmp_path: Path) -> None:
    with (tmp_path / "data").open("wb") as file:
        file.truncate(SIZE)
    huge = NewRange(PageClass.SR, SIZE, tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onecopy.store.disk.free_bytes", lambda _: -1)
        with pytest.raises(InsufficientResources):
            create_segment(store, REF, [huge])
    assert empty(store)


RANGE = st.builds(
    Range,
    st.sampled_from(PageClass),
    st.integers(-5, 5).map(lambda n: n * SIZE // 2),
    st.sampled_from(["", "erofs", "ext2", "ext4"]),
)


@given(st.lists(RANGE, max_size=4))
def test_what_is_allowed_is_right_and_comes_back(ranges: list[Range]) -> None:
    try:
        check(ranges)
    except InvalidInput as error:
        assert error.hint
        return
    assert ranges
    for item in ranges:
        assert item.size > 0 and item.size % SIZE == 0
        assert not item.fs or item.page_class.saved
        assert item.fs != "erofs" or not item.page_class.writable
    config = SegmentConfig(ranges=tuple(ranges))
    assert msgspec.json.decode(config.encode(), type=SegmentConfig) == config


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_a_record_of_anything_is_damage(value: object) -> None:
    from onecopy.store import Artifact

    config = msgspec.json.encode({"ranges": value})
    artifact = Artifact("segment", "a", "1", "sha256:0", "", config, ())
    with pytest.raises(StoreDamaged):
        SegmentConfig.of(artifact)


@given(st.text())
def test_any_text_for_a_range(text: str) -> None:
    try:
        NewRange.parse(text)
    except InvalidInput as error:
        assert error.hint
