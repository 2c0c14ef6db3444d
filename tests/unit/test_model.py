"""Names, references, sizes: what is taken, what is refused, and that it comes back as typed."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import InvalidInput
from onecopy.model import (
    HUGE_PAGE_SIZE,
    Reference,
    align_up,
    check_guest_name,
    check_name,
    format_size,
    in_order,
    parse_size,
)

_EDGE = string.ascii_lowercase + string.digits


def _names(inner: str) -> st.SearchStrategy[str]:
    edge = st.text(_EDGE, min_size=1, max_size=1)
    return st.one_of(edge, st.tuples(edge, st.text(_EDGE + inner, max_size=61), edge).map("".join))


versions = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: f"sha256:{raw.hex()}")


@given(_names("._-"), versions)
def test_name_and_version_come_back(name: str, version: str) -> None:
    reference = Reference.parse(f"{name}:{version}")
    assert (reference.name, reference.version, reference.digest) == (name, version, None)
    assert Reference.parse(str(reference)) == reference
    assert Reference.parse(name) == Reference(name, "latest")


@given(_names("._-"), digests)
def test_digest_comes_back(name: str, digest: str) -> None:
    reference = Reference.parse(f"{name}@{digest}")
    assert (reference.name, reference.digest) == (name, digest)
    assert str(reference) == f"{name}@{digest}"


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_refused_with_a_hint(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidInput as error:
        assert error.hint
    else:
        assert Reference.parse(str(reference)) == reference
        assert str(reference) in (text, f"{text}:latest", f"{text}latest")


@pytest.mark.parametrize(
    "text",
    ["", ":", "@", "a b", "A", "-a", "a-", ".a", "a/b", "..", "a\n", "\na", "a" * 64, "é", "a\0"],
)
def test_bad_names(text: str) -> None:
    for check in (check_name, check_guest_name, Reference.parse):
        with pytest.raises(InvalidInput) as caught:
            check(text)
        assert caught.value.hint


@pytest.mark.parametrize("text", ["a.b", "a_b", "web.example"])
def test_a_guest_name_is_a_host_name(text: str) -> None:
    assert check_name(text) == text
    with pytest.raises(InvalidInput):
        check_guest_name(text)


@given(_names("-"))
def test_guest_names_name_segments_too(name: str) -> None:
    assert check_guest_name(name) == check_name(name) == name


@pytest.mark.parametrize(
    "text", ["a:b:c", "a: b", "a:-x", "a:" + "v" * 129, "a@sha256:00", "a@" + "0" * 64, "a:1@x"]
)
def test_bad_references(text: str) -> None:
    with pytest.raises(InvalidInput):
        Reference.parse(text)


@given(st.integers(0, 2**22), st.sampled_from(["", "K", "M", "G", "T"]))
def test_sizes(number: int, unit: str) -> None:
    factor = 1024 ** " KMGT".index(unit or " ")
    suffixes = ["", "B", "iB"]
    for text in (unit, unit.lower(), *(unit + suffix for suffix in suffixes)):
        assert parse_size(f"{number}{text}") == number * factor


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "-1M",
        "+1M",
        "1.5G",
        "1,5G",
        "0x10",
        "1 M",
        "1P",
        "1MM",
        "1e3",
        "\u0661M",
        "9" * 5000,
        "8388608T",
    ],
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_size(text)
    assert "256M" in caught.value.hint


@given(st.integers(0, 2**50), st.sampled_from([4096, HUGE_PAGE_SIZE]))
def test_align_up(size: int, to: int) -> None:
    aligned = align_up(size, to)
    assert aligned % to == 0
    assert size <= aligned < size + to


@given(st.integers(0, 2**60))
def test_a_formatted_size_is_near(size: int) -> None:
    number, unit = format_size(size).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert abs(float(number) * factor - size) <= factor * 0.0501


def test_names_are_in_the_order_in_which_people_count() -> None:
    names = ["web-10", "web-2", "web", "a1b10", "a1b9", "web-02", "1", "web-" + "9" * 5000]
    assert sorted(names, key=in_order) == [
        *("1", "a1b9", "a1b10", "web", "web-02", "web-2", "web-10", "web-" + "9" * 5000),
    ]
