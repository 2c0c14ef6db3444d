"""advise: figures against counting page by page, and real processes whose pages are known."""

import mmap
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from onecopy.errors import InvalidInput, NotFound
from onecopy.guest.observe import advise as advising
from onecopy.guest.runtime import Runtime
from onecopy.model import MIB, PAGE_SIZE
from onecopy.sharing import file_pages
from onecopy.sharing.account import GuestMaps
from onecopy.sharing.advice import KINDS, WAYS, Advice, FileFound, advise
from onecopy.sharing.advice_page import page
from onecopy.sharing.file_pages import Contents, Image
from onecopy.sharing.ram_scan import ZERO, Scan, hash_pages, scan
from onecopy.sharing.survey import LeftOut, Sources, Survey, survey
from onecopy.store import Store
from tests.conftest import cannot_run
from tests.unit.other_user import as_nobody

#: A page's content is a small number here; 0 is the page of zeroes.
Ram = list[tuple[int, int]]


def hashed(content: int) -> np.uint64:
    return ZERO if content == 0 else np.uint64(content)


def made(name: str, ram: Ram, mergeable: bool = True) -> Scan:
    pages = dict(ram)
    return Scan(
        name=name,
        pid=1,
        ram_size=MIB,
        pages=np.array(sorted(pages), np.int64),
        hashes=np.array([hashed(pages[at]) for at in sorted(pages)], np.uint64),
        mergeable=np.full(len(pages), mergeable),
        shared=0,
        merged=0,
        swapped=0,
        missed=0,
    )


def files(*pages: set[int]) -> Contents:
    """File number n has pages[n]; none is of zeroes."""
    owner: dict[int, int] = {}
    for number, each in enumerate(pages):
        for content in each - {0}:
            owner.setdefault(content, number)
    known = sorted(owner)
    return Contents(
        np.array(known, np.uint64),
        np.array([owner[content] for content in known], np.int64),
        tuple(f"file{number}" for number in range(len(pages))),
        tuple(len(each) * PAGE_SIZE for each in pages),
    )


rams = st.lists(
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 6)), max_size=12), min_size=1, max_size=4
)


@given(rams, st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)))
def test_each_figure_by_counting(guests: list[Ram], root: set[int], extra: set[int]) -> None:
    guests = [list(dict(ram).items()) for ram in guests]
    scans = [made(f"g{n}", ram) for n, ram in enumerate(guests)]
    found = advise(scans, files(root), files(extra))
    every = Counter(content for ram in guests for _, content in ram)
    ways = {way.name: way.saves // PAGE_SIZE for way in found.ways}
    assert list(ways) == list(WAYS)
    assert ways["ksm"] == sum(count - 1 for count in every.values())
    for name, known in (("root", root), ("extra", extra)):
        assert ways[name] == sum(every[c] - 1 for c in known - {0} if every[c])
    # A saved system of that guest: what each other has of it, as often.
    names = [scan.name for scan in scans]
    best = names.index(found.best_guest) if found.best_guest else 0
    mine = Counter(content for _, content in guests[best])
    others = [Counter(c for _, c in ram) for n, ram in enumerate(guests) if n != best]
    assert ways["saved"] == sum((mine & other).total() for other in others)

    places = Counter(page for ram in guests for page in ram)

    def kind(page: tuple[int, int]) -> str:
        content = page[1]
        if content == 0:
            return "zero"
        if content in root | extra:
            return "file"
        if places[page] > 1:
            return "place"
        return "equal" if every[content] > 1 else "unique"

    kinds = Counter(kind(page) for ram in guests for page in ram)
    assert {name: size // PAGE_SIZE for name, size in found.kinds.items()} == {
        name: kinds[name] for name in KINDS
    }
    assert found.own == sum(found.kinds.values()) == every.total() * PAGE_SIZE
    assert found.possible == sum(found.overlaps.values()) <= found.own
    for way in found.ways:
        parts = {k: size for k, size in found.overlaps.items() if way.name in k.split("+")}
        assert (sum(parts.values()), parts.get(way.name, 0)) == (way.saves, way.alone)


@given(rams)
def test_nothing_is_said_of_what_was_not_looked_for(guests: list[Ram]) -> None:
    scans = [made(f"g{n}", ram) for n, ram in enumerate(guests)]
    assert [way.name for way in advise(scans).ways] == ["saved", "ksm"]
    assert advise(scans).files == ()


def test_no_guest_at_all() -> None:
    found = advise([])
    assert (found.own, found.possible, found.take, found.best_guest) == (0, 0, (), None)


def test_shared_memory_cannot_be_merged() -> None:
    ram = [(at, at + 1) for at in range(8)]
    found = advise([made("a", ram), made("b", ram, mergeable=False), made("c", ram)])
    ways = {way.name: way.saves for way in found.ways}
    assert ways == {"saved": 16 * PAGE_SIZE, "ksm": 8 * PAGE_SIZE}


def many(*numbers: int) -> Ram:
    return list(enumerate(numbers))


def test_what_is_recommended() -> None:
    pages = 32 * MIB // PAGE_SIZE
    same = many(*range(1, pages))
    alike = [made(name, same) for name in "abc"]
    assert advise(alike).take == ("saved",)
    assert "ksm would add 0.0 MiB" in advise(alike).reason
    # Each has the others' pages twice: only KSM finds the second copy.
    twice = [made(name, same + [(at + pages, n) for at, n in same]) for name in "ab"]
    assert advise(twice).take == ("saved", "ksm")
    strangers = [
        made(name, many(*range(n * pages, (n + 1) * pages))) for n, name in enumerate("ab")
    ]
    nothing = advise(strangers)
    assert nothing.take == () and "not worth" in nothing.reason
    half = files(set(range(1, pages // 2)))
    by_file = advise([made("a", same), made("b", [(at + 1, n) for at, n in same])], root=half)
    assert by_file.take == ("saved",)
    assert by_file.files[0].name == "file0"
    assert (by_file.files[0].guests, by_file.files[0].copies) == (
        2,
        2 * (pages // 2 - 1) * PAGE_SIZE,
    )


class Whole(HTMLParser):
    """Raises unless each element is closed in its turn; keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("names", [[], ["a"], ["<script>", "b&c"]])
def test_the_page(names: list[str]) -> None:
    pages = 32 * MIB // PAGE_SIZE
    scans = [made(name, many(*range(1, pages))) for name in names]
    found = Survey(advise(scans, files({1, 2})), (LeftOut("late", 7, "it <ended>"),), 1.0, 0)
    whole = Whole()
    whole.feed(page(found, [("onecopy run x", "guests & more")]))
    assert whole.open == []
    for said in (*names, "it <ended>", "guests & more", *KINDS, found.advice.reason):
        assert said in whole.text


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with files whose pages are known."""
    folder = tmp_path / "tree/sub"
    folder.mkdir(parents=True)
    (folder / "whole").write_bytes(os.urandom(64 * PAGE_SIZE))
    (folder / "tail").write_bytes(os.urandom(10 * PAGE_SIZE + 5))
    (folder / "zeroes").write_bytes(bytes(4 * PAGE_SIZE))
    with (folder / "holes").open("wb") as file:
        os.truncate(file.fileno(), 1 << 30)
        os.pwrite(file.fileno(), b"x" * PAGE_SIZE, 512 * MIB)
    (folder / "link").symlink_to("whole")
    os.mkfifo(folder / "pipe")
    (folder / "empty").write_bytes(b"")
    return tmp_path / "tree"


def test_contents_of_files(tree: Path) -> None:
    found = file_pages.of([], [tree])
    sizes = {Path(name).name: size for name, size in zip(found.names, found.sizes, strict=True)}
    assert sizes["whole"] == 64 * PAGE_SIZE and sizes["tail"] == 11 * PAGE_SIZE
    assert sizes["empty"] == 0 and sizes["holes"] < MIB
    assert "link" not in sizes and "pipe" not in sizes
    assert len(found.hashes) == 64 + 11 + 1
    tail = (tree / "sub/tail").read_bytes()[10 * PAGE_SIZE :].ljust(PAGE_SIZE, b"\0")
    pages = hash_pages(np.frombuffer(tail + bytes(PAGE_SIZE), np.uint8).reshape(2, -1))
    owners = found.find(pages)
    assert Path(found.names[owners[0]]).name == "tail" and owners[1] == -1
    # As an image it is the same pages.
    assert len(file_pages.of([Image("image", tree / "sub/whole")]).hashes) == 64
    assert len(file_pages.of([Image("gone", tree / "gone")]).names) == 0
    for wrong, error in ((tree / "gone", NotFound), (tree / "sub/whole", InvalidInput)):
        with pytest.raises(error):
            file_pages.of([], [wrong])


# Writes the pages of the file argv[1] to memory of argv[2] bytes between two pages that are none,
# and reads one page more.
GUEST = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size = int(sys.argv[2])
start = libc.mmap(None, ctypes.c_size_t(size + 8192), 0, 0x22, -1, ctypes.c_long(0)) + 4096
assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), 3) == 0
assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 15) == 0  # no huge pages
data = open(sys.argv[1], "rb").read()
ctypes.memmove(start, data, len(data))
ctypes.string_at(start + len(data) + 4096, 1)
print(flush=True)
input()
"""
SIZE = 24 * MIB + 12 * PAGE_SIZE


@pytest.fixture
def guests(tmp_path: Path) -> Iterator[list[GuestMaps]]:
    """Processes whose RAM is: files at other places, shifted data, unique data, zeroes."""
    shared = [os.urandom(PAGE_SIZE) for _ in range(1000)]
    shifted = os.urandom(500 * PAGE_SIZE)
    (tmp_path / "shared").write_bytes(b"".join(shared))
    with ExitStack() as stack:
        maps = []
        for number in range(3):
            unique = [os.urandom(PAGE_SIZE) for _ in range(300)]
            pages = shared + unique + [bytes(PAGE_SIZE)] * 50
            random.shuffle(pages)
            skewed = b"\2" * (100 * number) + shifted
            data = b"".join(pages) + skewed.ljust(502 * PAGE_SIZE, b"\1")
            (tmp_path / "data").write_bytes(data)
            argv = [sys.executable, "-c", GUEST, str(tmp_path / "data"), str(SIZE)]
            pipe = subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(argv, stdin=pipe, stdout=pipe))
            stack.callback(process.kill)
            assert process.stdout
            process.stdout.readline()
            maps.append(GuestMaps(f"guest{number}", process.pid, None, SIZE))
        yield maps


def check_guests(found: Advice) -> None:
    """``guests`` as they must be found; of 502 skewed pages the last one or two are padding."""
    ways = {way.name: way.saves // PAGE_SIZE for way in found.ways}
    assert 2 * 1000 <= ways["extra"] == found.overlaps["extra+saved+ksm"] // PAGE_SIZE <= 2000
    assert found.kinds["file"] == 3000 * PAGE_SIZE
    # Data that lies 100 bytes further are no equal pages: 3 x (300 + 500), and paddings.
    assert 0 <= 3 * 802 * PAGE_SIZE - found.kinds["unique"] <= 3 * 2 * PAGE_SIZE
    assert found.files[0].guests == 3 and found.files[0].copies == 3000 * PAGE_SIZE


def test_known_pages_of_real_processes(guests: list[GuestMaps], tmp_path: Path) -> None:
    if os.geteuid():
        cannot_run("page frames are hidden from others than root")
    (tmp_path / "tree").mkdir()
    (tmp_path / "shared").rename(tmp_path / "tree/shared")
    gone = GuestMaps("gone", 2**22 + 1, None, SIZE)
    lost = GuestMaps("lost", guests[0].pid, "/none", SIZE)
    found = survey([*guests, gone, lost], Sources(trees=[tmp_path / "tree"]))
    check_guests(found.advice)
    # 50 each; the page that was only read is the kernel's zero page, and costs nothing.
    assert found.advice.kinds["zero"] == 3 * 50 * PAGE_SIZE
    assert {each.name for each in found.left_out} == {"gone", "lost"}
    assert found.compared == 1000 * PAGE_SIZE
    for each in found.advice.guests:
        assert (each.own, each.merged, each.note) == ((1350 + 502) * PAGE_SIZE, 0, "")


def test_what_is_hidden_from_an_ordinary_user_is_left_out() -> None:
    def look() -> dict[str, object]:
        size = 1 << 30
        ram = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ram.madvise(mmap.MADV_NOHUGEPAGE)
        ram[: 72 * PAGE_SIZE] = os.urandom(64 * PAGE_SIZE) + bytes(8 * PAGE_SIZE)
        # Read only: the zero page, of which a user cannot tell that it is not a merged one.
        assert ram[100 * PAGE_SIZE] == 0
        found = scan(GuestMaps("mine", os.getpid(), None, size))
        zeroes = int(np.count_nonzero(found.hashes == ZERO))
        return {"merged": found.merged, "note": found.note, "own": found.own, "zeroes": zeroes}

    found = as_nobody(look)
    assert "root" in found.pop("note")
    assert found == {"merged": None, "own": 72 * PAGE_SIZE, "zeroes": 8}


@pytest.mark.parametrize(
    ("take", "best", "roots", "said"),
    [
        (["saved"], "ours", ["disk:/a"], ["save n-system --from ours", "run -n N n-system"]),
        (
            ["saved"],
            "theirs",
            ["disk:/a", "disk:/b"],
            ["build n --from disk:/a", "save n-system --root n", "run -n N n-system"],
        ),
        (
            ["saved", "ksm"],
            "theirs",
            [],
            ["build n --from SOURCE", "save n-system --root n", "run -n N n-system", "ksm on"],
        ),
        (["root"], None, ["dir:/a"], ["build n --from dir:/a", "boot n"]),
        (
            ["root", "saved"],
            "ours",
            ["dir:/a"],
            ["build n --from dir:/a", "save n-system --from ours", "run -n N n-system"],
        ),
        (
            ["extra"],
            "ours",
            [],
            ["build n-files --from dir:/f", "attach GUEST n-files:/MOUNTPOINT"],
        ),
        ([], "ours", [], []),
    ],
)
def test_steps(take: list[str], best: str | None, roots: list[str], said: list[str]) -> None:
    advice = replace(
        advise([]),
        take=tuple(take),
        best_guest=best,
        files=(FileFound("/f/one", PAGE_SIZE, 1),),
    )
    steps = advising._steps(advice, "n", {"ours"}, roots, [Path("/f")])
    assert [" ".join(step.argv[1:]) for step in steps] == said
    for step in steps:
        builds = step.argv[1] == "build" and "SOURCE" not in step.argv
        assert (step.ref, step.source) == ((step.argv[2], step.argv[4]) if builds else ("", ""))


def test_a_stored_segment_is_attached_as_it_is() -> None:
    found = (FileFound("python:latest", PAGE_SIZE, 1),)
    advice = replace(advise([]), take=("extra",), files=found)
    (step,) = advising._steps(advice, "n", (), [], [])
    assert step.argv[1:] == ("attach", "GUEST", "python:latest:/MOUNTPOINT")


def test_a_disk_that_became_another_file_is_not_built_from(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(PAGE_SIZE))
    found = path.stat()
    source = f"disk:{path}"
    advised = advising.Advised(
        survey([], Sources()),
        (advising.Step(("onecopy",), "", "new", source),),
        disks={source: (found.st_dev, found.st_ino)},
    )
    path.unlink()
    path.symlink_to("/etc/shadow")
    with pytest.raises(NotFound, match="another file"):
        advising.apply(Runtime(Store(tmp_path / "store"), tmp_path / "run"), advised)
