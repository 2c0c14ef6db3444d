"""Names and index: pure, by properties."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import AlreadyExists, NotFound, StoreDamaged
from onecopy.model import Reference
from onecopy.store import names, oci
from onecopy.store.layout import Layout

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
VERSIONS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
REFERENCES = st.builds(Reference, NAMES, VERSIONS)
ENTRIES = st.builds(
    oci.index_entry,
    st.sampled_from(oci.KINDS),
    REFERENCES,
    st.binary(max_size=20),
    st.just("2024-01-01T00:00:00Z"),
)
HINT = "hint"


def read_back(index: oci.Index, layout: Layout) -> oci.Index:
    return oci.decode(oci.encode(index), oci.Index, layout.index, HINT)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return Layout(tmp_path_factory.mktemp("store"))


@given(entries=st.lists(ENTRIES, max_size=8))
def test_every_name_is_found_again_as_it_was_last_bound(
    entries: list[oci.Descriptor], layout: Layout
) -> None:
    index = oci.EMPTY_INDEX
    for entry in entries:
        index = read_back(names.bind(index, entry), layout)
    last = {entry.ref: entry for entry in entries}
    assert {entry.ref: entry for entry in names.ours(index)} == last
    for ref, entry in last.items():
        parsed = Reference.parse(ref)
        assert names.find(index, parsed, entry.kind) == [entry]
        assert entry in names.find(index, Reference(parsed.name, digest=entry.digest))
        assert names.ours(names.drop(index, [entry])) == [
            other for other in names.ours(index) if other.ref != ref
        ]


@given(data=st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes, layout: Layout) -> None:
    try:
        index = oci.decode(data, oci.Index, layout.index, HINT)
    except StoreDamaged as error:
        assert str(layout.index) in error.message
        assert error.hint == HINT
    else:
        assert index.schema_version == 2


@pytest.mark.parametrize(
    "digest", ["sha256:../../../etc/passwd", "sha256:" + "0" * 64 + "\n", "sha256:" + "G" * 64, ""]
)
def test_a_digest_that_would_be_another_path_is_damage(digest: str, layout: Layout) -> None:
    entry = {"mediaType": oci.MANIFEST_TYPE, "digest": digest, "size": 1}
    data = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with pytest.raises(StoreDamaged):
        oci.decode(data, oci.Index, layout.index, HINT)


def test_entries_of_other_tools_are_kept_and_not_shown(layout: Layout) -> None:
    foreign = {
        "mediaType": oci.INDEX_TYPE,
        "digest": oci.digest_of(b"theirs"),
        "size": 6,
        "annotations": {oci.REF_NAME: "theirs:1"},
        "platform": {"architecture": "amd64", "os": "linux"},
        "urls": ["x:y"],
    }
    data = json.dumps({"schemaVersion": 2, "manifests": [foreign], "unknown": 1}).encode()
    index = oci.decode(data, oci.Index, layout.index, HINT)
    ours = oci.index_entry("segment", Reference.parse("ours:1"), b"m", "now")
    index = read_back(names.bind(index, ours), layout)
    assert names.ours(index) == [ours]
    assert json.loads(oci.encode(index))["manifests"][0] == foreign
    with pytest.raises(NotFound):
        names.find(index, Reference.parse("theirs:1"))
    with pytest.raises(AlreadyExists, match="another tool"):
        wanted = oci.index_entry("segment", Reference.parse("theirs:1"), b"m", "now")
        names.claim(index, wanted, replace=True)


def test_the_index_is_what_the_specification_asks_for() -> None:
    entry = oci.index_entry("system", Reference.parse("app:1"), b"{}", "2024-01-01T00:00:00Z")
    assert json.loads(oci.encode(names.bind(oci.EMPTY_INDEX, entry))) == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
                "size": 2,
                "artifactType": "application/vnd.onecopy.system.v1+json",
                "annotations": {
                    "org.opencontainers.image.ref.name": "app:1",
                    "org.opencontainers.image.created": "2024-01-01T00:00:00Z",
                },
            }
        ],
    }


def test_not_found_says_what_is_near() -> None:
    index = oci.EMPTY_INDEX
    for text in ("debian:1", "debian:2", "nginx:1"):
        entry = oci.index_entry("segment", Reference.parse(text), text.encode(), "now")
        index = names.bind(index, entry)
    for typed, near in (("debian", "debian:1 or debian:2"), ("ngnix:1", "nginx:1")):
        with pytest.raises(NotFound) as missing:
            names.find(index, Reference.parse(typed))
        assert f"did you mean {near}?" in missing.value.hint
    with pytest.raises(NotFound, match="nginx:1 is a segment, not a system"):
        names.find(index, Reference.parse("nginx:1"), "system")
    with pytest.raises(NotFound) as missing:
        names.find(index, Reference.parse("zzzzzz"))
    assert missing.value.hint == "`onecopy ls` lists all artifacts"
