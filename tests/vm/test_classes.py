"""The seven page classes in real guests: one cold, one cloned, both directions of each write.

Not here: loading and unloading as such (test_attach.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onecopy.guest.run_directory import GuestRecord
from onecopy.guest.runtime import Runtime
from onecopy.guest.segments.live_write import write as host_write
from onecopy.linux.counters import pagemap
from onecopy.model import PAGE_SIZE, PageClass, Reference
from onecopy.store import Artifact
from tests.vm import physical
from tests.vm.conftest import Clones, RunIn
from tests.vm.guests import open_guests
from tests.vm.segments import CONTENT, ZEROES, load, make, read, record, unload, write

CLASSES = tuple(PageClass)
#: A page that one test alone writes to: what was written once stays a copy.
UNWRITTEN = 5
MINE, THEIRS = "first guest's", "second guest's"
Pair = tuple[GuestRecord, GuestRecord]


@pytest.fixture(scope="module")
def booted(
    host: Runtime, busybox_root: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestRecord]:
    """A booted guest, and the segment of all classes that each test loads anew."""
    make(host, tmp_path_factory.mktemp("classes"), "classes", *CLASSES)
    with open_guests() as guests:
        yield guests.boot(busybox_root).record
    host.store.remove(Reference("classes"))


@pytest.fixture
def pair(host: Runtime, booted: GuestRecord, clones: Clones) -> Iterator[Pair]:
    """A booted guest and a clone which have loaded the segment, that nobody had loaded before."""
    both = booted, clones(1)[0]
    for guest in both:
        load(host, guest, "classes")
    yield both
    host.end(both[1])
    unload(host, booted, "classes")


def device(page_class: PageClass) -> str:
    number = CLASSES.index(page_class)
    return f"classes.{number}" if number else "classes"


def test_what_each_guest_sees(host: Runtime, pair: Pair, run_in: RunIn) -> None:
    segment = host.store.resolve(Reference("classes"))
    for page_class in CLASSES:
        name = device(page_class)
        start = CONTENT if page_class.saved else ZEROES
        assert [read(run_in, guest, name) for guest in pair] == [start, start], page_class
        for page, (writer, text) in enumerate(zip(pair, (MINE, THEIRS), strict=True), start=1):
            write(run_in, writer, name, text, page)
            seen = [read(run_in, guest, name, len(text), page).decode() for guest in pair]
            expected = [
                text if page_class.writable and (page_class.shared or guest is writer) else ""
                for guest in pair
            ]
            assert [each.strip("\0") for each in seen] == expected, (page_class, text)
    host.store.verify(segment)


def test_the_host_writes_and_both_guests_read(host: Runtime, pair: Pair, run_in: RunIn) -> None:
    name = device(PageClass.SC)
    ref = Reference("classes")
    assert host_write(host.store, ref, [b"news ", b"from the host"], offset=PAGE_SIZE) == 18
    for guest in pair:
        assert read(run_in, guest, name, 18, 1) == b"news from the host"
        write(run_in, guest, name, "a guest's", 1)
    for guest in pair:
        assert read(run_in, guest, name, 18, 1) == b"news from the host"
    host.store.verify(host.store.resolve(ref))


def test_a_copy_for_all_ends_with_its_last_user(host: Runtime, pair: Pair, run_in: RunIn) -> None:
    first, second = pair
    for page_class in (PageClass.SW, PageClass.SN):
        write(run_in, first, device(page_class), MINE)
    unload(host, first, "classes")
    # One is left: who comes finds what was written.
    load(host, first, "classes")
    for page_class in (PageClass.SW, PageClass.SN):
        assert read(run_in, first, device(page_class), len(MINE)).decode() == MINE
    for guest in pair:
        unload(host, guest, "classes")
    load(host, second, "classes")
    assert read(run_in, second, device(PageClass.SW)) == CONTENT
    assert read(run_in, second, device(PageClass.SN)) == ZEROES
    # And also when both ended without a word.
    write(run_in, second, device(PageClass.SW), THEIRS)
    host.end(second)
    load(host, first, "classes")
    assert read(run_in, first, device(PageClass.SW)) == CONTENT


def test_a_copy_of_ones_own_is_new_when_it_comes_back(
    host: Runtime, pair: Pair, run_in: RunIn
) -> None:
    guest, _ = pair
    slots = [each.address for each in record(host, guest).attached[-1].devices]
    for page_class in (PageClass.EW, PageClass.EN):
        write(run_in, guest, device(page_class), MINE)
    kept = unload(host, guest, "classes")
    assert kept.state == "detached" and guest.name in host.store.users(kept.digest)
    again = load(host, guest, "classes")
    assert [each.address for each in again.devices] == slots
    assert read(run_in, guest, device(PageClass.EW)) == CONTENT
    assert read(run_in, guest, device(PageClass.EN)) == ZEROES


def test_which_guests_share_pages(host: Runtime, pair: Pair, run_in: RunIn) -> None:
    """S classes are one page frame of the host, E classes one each; EW shares what is unwritten."""
    shares = {}
    for page_class in CLASSES:
        for guest in pair:
            read(run_in, guest, device(page_class), page=UNWRITTEN)
        frames = [frame(host, guest, page_class) for guest in pair]
        assert None not in frames, page_class
        shares[page_class] = frames[0] == frames[1]
    assert shares == {each: each.shared or each is PageClass.EW for each in CLASSES}
    for guest in pair:
        write(run_in, guest, device(PageClass.EW), "own", UNWRITTEN)
    assert frame(host, pair[0], PageClass.EW) != frame(host, pair[1], PageClass.EW)


def frame(host: Runtime, guest: GuestRecord, page_class: PageClass) -> int | None:
    """The page frame of a page that no other test writes to."""
    found = next(item for item in record(host, guest).attached if item.name == "classes")
    item = found.devices[CLASSES.index(page_class)]
    path = f"{item.path} (deleted)" if item.path.startswith("/memfd:") else item.path
    return pagemap.pfn(physical.entries(guest, path)[UNWRITTEN])
