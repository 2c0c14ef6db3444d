"""What is refused before anything is begun, and what its hint says to whom."""

from pathlib import Path

import pytest

from onecopy import cli
from onecopy.errors import (
    AlreadyExists,
    InvalidInput,
    MissingProgram,
    NotFound,
    OtherDomain,
    TooLarge,
)
from onecopy.guest.segment_costs import require_room
from onecopy.model import MIB, Reference
from onecopy.store import Access, Store
from tests.unit.other_user import as_nobody
from tests.unit.store_kit import digest_of, put

GIB = 1 << 30


def _ref(artifact_digest: str, digits: int) -> Reference:
    return Reference.parse(f"app@{artifact_digest[: 7 + digits]}")


def test_a_digest_can_be_short_where_it_is_unique(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = [put(store, f"app:{number}", b"%d" % number) for number in range(4)]
    for artifact in found:
        for digits in (6, 12, 64):
            assert store.resolve(_ref(artifact.digest, digits)).ref == artifact.ref
    store.tag(Reference("app", "0"), Reference("app", "again"))
    assert store.resolve(_ref(found[0].digest, 8)).digest == found[0].digest
    assert store.remove(_ref(found[3].digest, 8)).ref == "app:3"
    with pytest.raises(NotFound):
        store.resolve(_ref(found[3].digest, 8))


def test_a_short_digest_of_several_names_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    # So many that two begin alike: with 6 digits some thousands would have to be made.
    found = [put(store, f"app:{number}", b"%d" % number).digest for number in range(40)]
    alike = {digest[:8] for digest in found if sum(d[:8] == digest[:8] for d in found) > 1}
    shortest = Reference("app", digest=min(alike))
    with pytest.raises(InvalidInput, match=" or sha256:") as caught:
        store.resolve(shortest)
    assert sum(digest in caught.value.message for digest in found) > 1
    with pytest.raises(InvalidInput):
        store.remove(shortest)
    assert len(store.artifacts()) == 40


def test_what_is_held_can_be_meant_by_a_short_digest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store, "app:1")
    with store.hold([artifact.digest], "web-1"):
        store.remove(Reference("app", "1"), in_use=True)
        assert store.resolve(_ref(artifact.digest, 6)).digest == artifact.digest


def test_a_name_that_cannot_be_had_is_known_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "app:1")
    store.require_free("segment", Reference("app", "1"))
    store.require_free("system", Reference("app", "2"))
    with pytest.raises(AlreadyExists, match="app:1 is a segment"):
        store.require_free("system", Reference("app", "1"))
    with pytest.raises(InvalidInput, match="cannot be a new name"):
        store.require_free("segment", Reference("app", digest=digest_of(b"")))
    with pytest.raises(OtherDomain):
        store.require_free("segment", Reference("app", "2"), Access(domain="lab"))


def test_the_hint_is_what_can_be_done_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "root:1")
    put(store, "web:1", kind="system")
    with pytest.raises(NotFound) as caught:
        store.resolve(Reference("root", "1"), "system")
    assert "boot root:1" in caught.value.hint
    assert "save NAME --root root:1" in caught.value.hint
    with pytest.raises(NotFound) as caught:
        store.resolve(Reference("web", "1"), "segment")
    assert "`onecopy run web:1`" in caught.value.hint


@pytest.mark.parametrize(
    ("sizes", "memory", "wanted"),
    [
        ([2 * GIB], 128, None),
        ([274 * MIB], 128, None),
        ([GIB, GIB, 2 * MIB], 128, "--memory 256M"),
        ([20 * GIB], 256, "--memory 1280M"),
        ([20 * GIB], 1280, None),
    ],
)
def test_what_describes_segments_fits_the_guest(
    sizes: list[int], memory: int, wanted: str | None
) -> None:
    if wanted is None:
        require_room(sizes, memory * MIB)
        return
    with pytest.raises(TooLarge) as caught:
        require_room(sizes, memory * MIB)
    assert wanted in caught.value.hint


def _hint() -> str:
    return MissingProgram("mkfs.erofs", "erofs-utils").hint


def test_nobody_is_told_to_do_what_only_root_may() -> None:
    told = as_nobody(_hint)
    assert _hint() == "apt-get install erofs-utils"
    assert told.startswith("ask who administers this host")
    assert told.endswith("apt-get install erofs-utils")


def test_rm_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONECOPY_HOME", str(tmp_path / "home"))
    store = Store()
    held = put(store, "held:1", b"held")
    put(store, "app:1")
    with store.hold([held.digest], "web-1"):
        assert cli.main(["rm", "held:1", "none:1", "app:1"]) == 4
    out, err = capfd.readouterr()
    assert out == "app:1 removed\n"
    assert err.index("held:1 is in use") < err.index("no artifact none:1")
    assert cli.main(["stop", "nobody", "none"]) == 3
    assert "no guest 'none'" in capfd.readouterr().err
