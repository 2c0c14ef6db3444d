"""tests/console.py: sessions are read as they are typed, and output that differs is found."""

from pathlib import Path

import pytest

from tests.console import Step, follow, sessions, shows

PAGE = """Text.

```console
$ one a \\
    b
said
$ two
```

```console
$ three
[...]
```
"""


def test_sessions_are_read() -> None:
    assert sessions(PAGE) == [
        [Step("one a \\\n    b", "said\n"), Step("two", "")],
        [Step("three", "[...]\n")],
    ]


@pytest.mark.parametrize(
    ("page", "output", "same"),
    [
        ("web-3\n", "web-3\n", True),
        ("web-3\n", "web-2\n", False),
        ("", "web-2\n", False),
        ("a:latest sha256:12ab[...] 2.0 MiB\n", "a:latest sha256:ffff 15.5 MiB\n", True),
        ("a:latest sha256:12ab[...] 2.0 MiB\n", "b:latest sha256:ffff 15.5 MiB\n", False),
        ("[...]\nlast\n", "first\n\nsecond\nlast\n", True),
        ("[...]\nlast\n", "first\nlast one\n", False),
        ("[...]\nlast\n", "last\n", True),
        ("[...]\nlast\n", "", False),
        ("[...]\n", "", True),
        ("up   0.1 s\n", "up 12 s\n", True),
    ],
)
def test_output_is_compared(page: str, output: str, same: bool) -> None:
    assert shows(page, output) is same


def test_a_session_is_followed(tmp_path: Path) -> None:
    session = [Step("echo $WHO >file", ""), Step("cat file", "me\n")]
    assert follow(session, tmp_path, {"WHO": "me"}) == "me\n"
    for wrong in (Step("cat file", "you\n"), Step("false", "")):
        with pytest.raises(AssertionError):
            follow([wrong], tmp_path, {})
