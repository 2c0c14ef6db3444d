"""A test with real guests, as short as they get: tests/README.md shows it."""

from onecopy.store import Artifact
from tests.command import answer
from tests.vm.guests import Guests


def test_clones_keep_their_writes_to_themselves(guests: Guests, saved: Artifact) -> None:
    one, two = guests.clone(saved, 2)
    one.exec(["sh", "-c", "echo mine >/root/note"])
    # Each guest reports its own files and name.
    assert one.exec(["cat", "/root/note"]).text == "mine\n"
    assert two.exec(["cat", "/root/note"], check=False).exit_code == 1
    assert [each.exec(["hostname"]).text.strip() for each in (one, two)] == [one.name, two.name]
    # The command knows the same guests as the Python API.
    assert {one.name, two.name} <= {row["name"] for row in answer("ps", "--json")}
