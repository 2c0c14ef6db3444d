"""Runs in a guest: commits numbers to SQLite and tells each once it is on the disk.

`commits.py write DATABASE JOURNAL-MODE` goes on from the last one until the power goes.
`commits.py check DATABASE` prints the last number if all up to it are there, and whole.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys


def payload(number: int) -> str:
    """A row's text, of different lengths: rows and pages are no multiples of each other."""
    return hashlib.sha256(str(number).encode()).hexdigest() * (number % 7 + 1)


def last(database: sqlite3.Connection) -> int:
    """The last number; raise AssertionError if one before it is missing or damaged."""
    (state,) = database.execute("pragma integrity_check").fetchone()
    assert state == "ok", state
    rows = database.execute("select number, text from commits order by number").fetchall()
    assert rows == [(n, payload(n)) for n in range(1, len(rows) + 1)], rows[-3:]
    return len(rows)


def main() -> None:
    verb, path, *rest = sys.argv[1:]
    database = sqlite3.connect(path, isolation_level=None)
    if verb == "write":
        database.execute(f"pragma journal_mode={rest[0]}")
        # With "full", SQLite does not sync the directory after it has deleted the journal. A
        # journal that is back after a power cut undoes the last commit (sqlite.org/pragma.html).
        database.execute("pragma synchronous=extra")
    database.execute("create table if not exists commits (number integer primary key, text)")
    number = last(database)
    print(number, flush=True)
    while verb == "write":
        number += 1
        database.execute("begin immediate")
        database.execute("insert into commits values (?, ?)", (number, payload(number)))
        database.execute("commit")
        print(number, flush=True)


main()
