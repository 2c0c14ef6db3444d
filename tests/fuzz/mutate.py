"""Inputs from samples: each is decided by the seed, the reader's name and its number alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

_LONGEST = 64 << 10
_TOKENS = [
    *(
        b"\0",
        b"\xff",
        b"\xc3(",
        b"\xed\xa0\x80",
        b"\x1b[2J",
        b"\r\n",
        b"\n",
        b" ",
        b",",
        b",,",
        b":",
    ),
    *(
        b"../",
        b"/",
        b"%s",
        b"$(id)",
        b"`id`",
        b"'",
        b'"',
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"@",
        b"=",
    ),
    *(b"{}", b"[]", b"null", b"true", b"-1", b"1e999", b"NaN", b"{", b"}", b"[", b"]", b'"a":1,'),
    *(b"sha256:" + b"0" * 64, b"sha256:", b"-", b"--", b"-h", b"\xe2\x80\xae", b"\xd9\xa3"),
]
_LARGE = [
    *(
        b"9" * 5000,
        b"[" * 1500,
        b'{"a":' * 1500,
        b"(" * 300,
        b"A" * 5000,
        b"/" * 4096,
        b"a/" * 2100,
    ),
    *(b"\0" * 1024, b"\xff" * 600, b"1 " * 2000, b"\n" * 1000, b"0" * 70000, b"," * 3000),
]
_NUMBERS = [
    *(b"0", b"1", b"-1", b"127", b"255", b"65535", b"65536", b"2147483648", b"4294967295"),
    *(
        b"9223372036854775807",
        b"9223372036854775808",
        b"18446744073709551616",
        b"-9223372036854775809",
    ),
    *(b"1e10", b"0x10", b"1.5", b"00", b"\xd9\xa3", b"", b"9" * 40, b"9" * 4301),
]
_DIGITS = re.compile(rb"[0-9]+")
_FIELD = re.compile(rb'"[^"\\]{0,40}":(?:"[^"\\]{0,80}"|[0-9]+|true|false|null)')

Random = random.Random


def make(seed: int, reader: str, number: int, samples: Sequence[bytes]) -> bytes:
    """Input ``number``: one of the samples, changed in one to eight places."""
    dice = Random(f"{seed}/{reader}/{number}")
    data = dice.choice(samples)
    for _ in range(1 + int(dice.expovariate(0.7)) % 8):
        data = dice.choice(_CHANGES)(dice, data, samples)[:_LONGEST]
    return data


def _at(dice: Random, data: bytes) -> int:
    return dice.randint(0, len(data))


def _flip(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    if not data:
        return data
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]


def _byte(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _at(dice, data)
    return data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]


def _cut(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: _at(dice, data)]


def _drop(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at, end = sorted((_at(dice, data), _at(dice, data)))
    return data[:at] + data[end:]


def _double(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at, end = sorted((_at(dice, data), _at(dice, data)))
    return data[:end] + data[at:end] * dice.choice((1, 2, 30)) + data[end:]


def _token(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _at(dice, data)
    return data[:at] + dice.choice(_TOKENS) + data[at + dice.choice((0, 0, 1, 4)) :]


def _large(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    # Seldom: what is long is slow.
    if dice.random() < 0.7:
        return _token(dice, data, _)
    at = _at(dice, data)
    return data[:at] + dice.choice(_LARGE) + data[at:]


def _number(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    found = list(_DIGITS.finditer(data))
    if not found:
        return data + dice.choice(_NUMBERS)
    match = dice.choice(found)
    return data[: match.start()] + dice.choice(_NUMBERS) + data[match.end() :]


def _field(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A key of JSON once more, or with another one's value."""
    found = list(_FIELD.finditer(data))
    if not found:
        return _token(dice, data, _)
    one, other = dice.choice(found), dice.choice(found)
    key, value = one[0].partition(b":")[0], other[0].partition(b":")[2]
    new = key + b":" + value
    return data[: one.start()] + new + dice.choice((b",", b"")) + data[one.start() :]


def _splice(dice: Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    other = dice.choice(samples)
    return data[: _at(dice, data)] + other[_at(dice, other) :]


def _noise(dice: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _at(dice, data)
    return data[:at] + dice.randbytes(dice.randint(1, 64)) + data[at:]


_CHANGES: list[Callable[[Random, bytes, Sequence[bytes]], bytes]] = [
    *(_flip, _byte, _byte, _cut, _drop, _double, _token, _token, _large, _number, _number),
    *(_field, _field, _splice, _noise),
]
