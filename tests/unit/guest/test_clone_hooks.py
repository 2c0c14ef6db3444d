"""Clone hooks as users type them, and what a guest may tell of its programs.

Not here: what hooks do (tests/vm/test_hooks.py).
"""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecopy.cli.save_cmd import warning
from onecopy.errors import AgentFailed, InvalidInput
from onecopy.guest.lifecycle.clone_hooks import KEPT, Hooks, check_hook, parse_hooks, read
from onecopy.images.tools import ready_hooks

REDIS = "secrets\tredis-server\tredis-server.service\tredis\tredis\t1"
APP = "secrets\tpython3.13\tapp.service\tlibcrypto.so\t-\t2"
NODE = "numbers\tnode\t-\tnode\tnode\t1"
SSHD = "secrets\tsshd\tssh.service\tlibcrypto.so\tkeys\t1"


def found(*lines: str) -> dict[str, str]:
    """Program -> what covers it."""
    told = read("\n".join(lines).encode())
    return {each.program: each.covered for each in told.generators}


@pytest.mark.parametrize(
    "hook",
    [*ready_hooks(), "auto", "none", "restart:app@1.service", "signal:HUP:a", "signal:RTMIN+1:b*"],
)
def test_hooks(hook: str) -> None:
    assert check_hook(hook) == hook


@pytest.mark.parametrize(
    ("texts", "hooks"),
    [
        (None, KEPT),
        ([], Hooks(())),
        (["redis", "nginx"], Hooks(("redis", "nginx"))),
        (["command:a"], Hooks(None, "a")),
        (["command:"], Hooks(None, "")),
        (["redis", "command:a"], Hooks(("redis",), "a")),
        (["none"], Hooks(("none",), "")),
    ],
)
def test_what_is_kept_of_the_guests_own(texts: list[str] | None, hooks: Hooks) -> None:
    assert parse_hooks(texts) == hooks


@pytest.mark.parametrize(
    "text",
    [
        *("", "apache", "../redis", "auto:redis", "restart:", "restart:a b", "restart:a\nb"),
        *("signal:a", "signal::a", "signal:HUP:", "signal:HUP:a;b", "restart:$(x)", "\x1b[2J"),
    ],
)
def test_no_hooks(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not a clone hook") as caught:
        parse_hooks(["redis", text])
    assert "redis" in caught.value.hint


def test_which_hook_covers_a_program() -> None:
    assert found(REDIS, APP, SSHD) == {
        "redis-server": "",
        "python3.13": "",
        "sshd": "SSH host keys",
    }
    assert found("runs redis", REDIS)["redis-server"] == "redis"
    for hook in ("restart:app", "restart:app.service", "restart:python3.13", "signal:HUP:python*"):
        assert found("runs /etc/onecopy/clone.d/x", f"runs {hook}", APP) == {"python3.13": hook}
    assert found("runs restart:other", "runs signal:HUP:py", APP) == {"python3.13": ""}
    # No unit is none.
    assert found("runs restart:", "runs restart:-", NODE) == {"node": ""}


def test_the_warning_names_what_is_left_and_secrets_first() -> None:
    told = read("\n".join(["runs redis", NODE, APP, REDIS, SSHD]).encode())
    lines = warning(told.generators)
    assert len(lines) == 4
    assert "python3.13 in app.service (libcrypto.so): keys and tokens" in lines[1]
    assert "restart:app.service" in lines[1]
    assert "node (node): keys" not in lines[2]
    assert "numbers" in lines[2]
    assert not warning(read(b"runs redis\n" + REDIS.encode()).generators)


def test_what_a_guest_tells_is_bounded() -> None:
    many = read(b"\n".join([b"runs x" * 99, REDIS.encode(), b"a\tb"] * 1000))
    assert len(many.runs) == len(many.generators) == 100
    odd = read(f"runs \x1b[2J\nsecrets\t\x1b]0;x\x07\t{'u' * 500}\ta\t../../etc\t1".encode())
    (one,) = odd.generators
    assert one.program.isprintable()
    assert len(one.unit) < 100
    assert one.hook == ""
    for number in (b"-1", b"1e9", b"9" * 30, b"\xff"):
        with pytest.raises(AgentFailed):
            read(b"secrets\ta\t-\tb\t-\t" + number)


@given(st.binary())
def test_any_bytes_are_read_or_refused(told: bytes) -> None:
    with contextlib.suppress(AgentFailed):
        for each in read(told).generators:
            assert each.program.isprintable()
            assert each.unit.isprintable()
