"""The requests of guests: whatever comes, in whatever pieces, does no harm."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from onecopy.errors import NotFound, StoreDamaged
from onecopy.guest.segments import protocol
from onecopy.guest.segments.protocol import LIMIT, VERBS, Lines, MalformedRequest, Request, parse

WORD = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=60)
ID = st.text("0123456789abcdef", min_size=1, max_size=32)


@st.composite
def valid(draw: st.DrawFn) -> Request:
    verb = draw(st.sampled_from(sorted(VERBS)))
    arguments = draw(st.lists(WORD, min_size=VERBS[verb], max_size=VERBS[verb]))
    return Request(draw(ID), verb, tuple(arguments))


@given(valid())
def test_a_request_comes_as_it_was_sent(request: Request) -> None:
    assert parse(request.line().rstrip(b"\n")) == request


@given(st.lists(st.binary(max_size=3000), max_size=20))
def test_any_bytes_in_any_pieces(pieces: list[bytes]) -> None:
    lines = Lines()
    for piece in pieces:
        for found in lines.feed(piece):
            assert isinstance(found, Request | MalformedRequest)
        assert len(lines._rest) <= LIMIT  # what a flood makes us keep


@given(st.lists(valid(), min_size=1, max_size=5), st.data())
def test_pieces_make_no_difference(sent: list[Request], data: st.DataObject) -> None:
    stream = b"".join(request.line() for request in sent)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    ends = [0, *sorted(cuts), len(stream)]
    lines = Lines()
    found: list[Request | MalformedRequest] = []
    for start, end in itertools.pairwise(ends):
        found += lines.feed(stream[start:end])
    assert found == sent


@given(st.binary(min_size=LIMIT + 1, max_size=4 * LIMIT), valid())
def test_after_a_line_that_is_too_long_the_next_is_heard(flood: bytes, request: Request) -> None:
    lines = Lines()
    found = list(lines.feed(flood.replace(b"\n", b"x")))
    found += lines.feed(b"\n" + request.line())
    assert [type(each) for each in found] == [MalformedRequest, Request]
    assert found[-1] == request


def test_what_is_refused() -> None:
    for line, id_ in (
        (b"", "-"),
        (b"list", "-"),
        (b"zz list", "-"),
        (b"1 fly", "1"),
        (b"1 list now", "1"),
        (b"1 load a", "1"),
        (b"1 load a  b", "1"),
        (b"1 load a\tb c d", "-"),
        (b"\xff list", "-"),
    ):
        found = parse(line)
        assert isinstance(found, MalformedRequest) and found.id == id_, line


@given(st.text(), st.text())
def test_an_answer_is_one_line(first: str, second: str) -> None:
    for line in (protocol.ok("1", first), protocol.error("1", "error", 1, second)):
        assert line.endswith(b"\n") and line.count(b"\n") == 1 and len(line) <= LIMIT
        line.decode("ascii")


def test_what_is_the_host_s_own_is_not_told() -> None:
    damaged = StoreDamaged("/var/lib/onecopy/blobs/1 is missing")
    assert b"/var" not in protocol.refusal("1", damaged, (NotFound,))
    assert protocol.refusal("1", NotFound("there is no a"), (NotFound,)) == (
        b"1 error not-found 3 there is no a\n"
    )
