"""Who may load what: patterns, trust domains, and that it stays with a name."""

import json
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from onecopy.errors import InvalidInput, NotFound, OtherDomain, Restricted, StoreDamaged
from onecopy.model import Reference
from onecopy.store import Access, Store, access, names, oci
from tests.unit.store_kit import put

GUESTS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
DOMAINS = st.one_of(
    st.just(""), st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
)
ACCESSES = st.builds(
    Access, DOMAINS, st.booleans(), st.lists(st.one_of(GUESTS, st.just("web-*"))).map(tuple)
)
RESTRICTED = Access(restricted=True, grants=("web-*", "db"))


@given(guest=GUESTS, domain=DOMAINS)
def test_a_name_grants_itself_and_nothing_grants_nobody(guest: str, domain: str) -> None:
    assert access.is_granted([access.check_grant(guest)], guest, domain)
    assert access.is_granted(["domain:*"], guest, domain)
    assert not access.is_granted([], guest, domain)
    assert not access.is_granted([f"{guest}x", f"x{guest}", f"domain:x{domain}"], guest, domain)


@given(pattern=st.text("abc*?[]!-0", min_size=1, max_size=20), guest=GUESTS, domain=DOMAINS)
def test_any_pattern_is_either_refused_or_can_be_matched(
    pattern: str, guest: str, domain: str
) -> None:
    assert access.is_granted([access.check_grant(pattern)], guest, domain) in (True, False)


@given(text=st.text(max_size=90))
def test_what_is_no_grant_or_domain_is_refused(text: str) -> None:
    for check in (access.check_grant, access.check_domain):
        try:
            assert check(text) == text
        except InvalidInput as error:
            assert error.hint
        else:
            # No blank, colon or control character ever gets into index.json.
            assert text.removeprefix("domain:").isascii()
            assert text.isprintable()


@given(record=ACCESSES, guest=GUESTS, domain=DOMAINS)
def test_each_refusal_is_of_its_own(record: Access, guest: str, domain: str) -> None:
    granted = not record.restricted or access.is_granted(record.grants, guest, domain)
    wanted = OtherDomain if record.domain != domain else None if granted else Restricted
    if wanted is None:
        access.require("app", record, guest, domain)
        return
    with pytest.raises(wanted, match="app") as error:
        access.require("app", record, guest, domain)
    assert "onecopy" in error.value.hint


@given(record=ACCESSES)
def test_what_is_bound_is_read_back_and_goes_with_the_name(record: Access) -> None:
    entry = oci.index_entry("segment", Reference.parse("app:1"), b"m", "now")
    foreign = msgspec.structs.replace(oci.EMPTY_INDEX, annotations={"org.other": "kept"})
    index = access.bind(names.bind(foreign, entry), "app", record)
    index = msgspec.json.decode(oci.encode(access.prune(index)), type=oci.Index)
    assert access.of(index, "app") == record
    assert access.of(index, "ap") == access.of(index, "app.x") == Access()
    assert access.prune(names.drop(index, [entry])).annotations == {"org.other": "kept"}


@given(
    text=st.one_of(
        st.text(max_size=50),
        st.recursive(st.one_of(st.integers(), st.text()), st.lists).map(json.dumps),
        st.sampled_from(
            ['{"restricted":1}', '{"grants":"web"}', '{"domain":null}', "[" * 9999, "null", ""]
        ),
    )
)
def test_a_damaged_record_is_damage_and_never_free_for_all(text: str) -> None:
    assume(text != "{}")
    index = msgspec.structs.replace(oci.EMPTY_INDEX, annotations={"org.onecopy.access.app": text})
    with pytest.raises(StoreDamaged, match=r"app.*index\.json"):
        access.of(index, "app")


def test_it_is_kept_by_every_update_and_gone_with_the_last_version(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "app:1", b"one")
    assert store.restrict("app", lambda _: RESTRICTED) == RESTRICTED
    put(store, "app:1", b"new")
    put(store, "app:2", b"two")
    store.tag(Reference.parse("app:2"), Reference.parse("app:3"))
    store.tag(Reference.parse("app:2"), Reference.parse("copy:1"))
    assert Store(tmp_path).access("app") == store.access("copy") == RESTRICTED
    store.restrict("copy", lambda _: Access())
    assert store.access("app") == RESTRICTED
    for version in "123":
        assert store.access("app") == RESTRICTED
        store.remove(Reference("app", version))
    assert store.access("app") == Access()
    put(store, "app:1", b"one")
    assert store.access("app") == Access()
    with pytest.raises(NotFound, match="other"):
        store.restrict("other", lambda _: RESTRICTED)


def test_require_access_names_the_one_that_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, "open:1")
    put(store, "closed:1")
    store.restrict("closed", lambda _: RESTRICTED)
    store.require_access(["open", "closed"], "web-7", "")
    with pytest.raises(Restricted, match=r"closed.*mail"):
        store.require_access(["open", "closed"], "mail", "")
    with pytest.raises(OtherDomain, match="open"):
        store.require_access(["open", "closed"], "web-7", "lab")


def test_two_who_grant_at_once_both_do(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store)

    def grant(number: int) -> None:
        for turn in range(5):
            name = f"g{number}-{turn}"
            store.restrict(
                "app",
                lambda now: Access(restricted=True, grants=(*now.grants, name)),  # noqa: B023
            )

    threads = [threading.Thread(target=grant, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(store.access("app").grants) == [f"g{n}-{t}" for n in range(4) for t in range(5)]
