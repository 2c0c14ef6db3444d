"""Several who write one name at once: each version is whole, and none is lost unnoticed."""

import os
import threading
from functools import partial
from pathlib import Path

from onecopy.errors import NameConflict, OtherDomain
from onecopy.model import Reference
from onecopy.store import Access, NewLayer, Store
from tests.unit.store_kit import PMEM, check_whole, fork, put

APP = Reference.parse("app:1")


def update(store: Store, content: bytes, expected: str) -> str:
    """Put ``content`` as the next version, if the name still means ``expected``."""
    with store.workspace() as work:
        (work / "layer").write_bytes(content)
        layer = NewLayer(work / "layer", PMEM, {"org.onecopy.role": "image"})
        return store.put("segment", APP, b"{}", [layer], replace=expected).digest


def test_processes_put_one_name_and_the_last_one_is_whole(tmp_path: Path) -> None:
    Store(tmp_path)

    def work(number: int) -> None:
        mine = Store(tmp_path)
        for turn in range(10):
            # Two layers each: a mixture would show.
            content = b"%d of %d" % (turn, number)
            with mine.workspace() as folder:
                layers = []
                for part in (b"a", b"b"):
                    file = folder / part.decode()
                    file.write_bytes(part + content)
                    layers.append(NewLayer(file, PMEM, {"org.onecopy.role": part.decode()}))
                mine.put("segment", APP, content, layers)
            found = Store(tmp_path).resolve(APP)
            parts = {layer.path.read_bytes()[1:] for layer in found.layers if layer.path.exists()}
            assert parts <= {found.config}

    children = [fork(partial(work, number)) for number in range(6)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    found = Store(tmp_path).resolve(APP)
    assert [layer.path.read_bytes() for layer in found.layers] == [
        b"a" + found.config,
        b"b" + found.config,
    ]
    check_whole(tmp_path)


def test_of_those_who_expect_the_same_one_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = put(store).digest
    wins: list[bytes] = []
    losses: list[str] = []
    start = threading.Barrier(8)

    def work(content: bytes) -> None:
        start.wait()
        try:
            update(store, content, first)
            wins.append(content)
        except NameConflict as error:
            losses.append(error.message)

    threads = [threading.Thread(target=work, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wins), len(losses)) == (1, 7)
    assert store.resolve(APP).layers[0].path.read_bytes() == wins[0]
    assert all(store.resolve(APP).digest in message for message in losses)
    check_whole(tmp_path)


def test_two_domains_want_one_new_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    start, seen = threading.Barrier(2), []

    def work(domain: str) -> None:
        with store.workspace() as folder:
            (folder / "layer").write_bytes(b"content")
            start.wait()
            try:
                layer = NewLayer(folder / "layer", PMEM)
                store.put("segment", APP, b"{}", [layer], access=Access(domain=domain))
                seen.append(domain)
            except OtherDomain:
                pass

    threads = [threading.Thread(target=work, args=(domain,)) for domain in ("lab", "shop")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.access("app").domain] == seen
    assert store.resolve(APP).layers[0].domain == seen[0]
    store.verify(store.resolve(APP))
    check_whole(tmp_path)
