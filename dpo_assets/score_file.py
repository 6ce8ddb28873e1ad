"""The SQLite file of scores that are kept per model and pair, and which of them go: those of models that nobody scores.

A key stands for a model and everything else that its scores depend on. A refresh that trains anew makes new keys, and
without an end the file would grow by all pairs with each of them. What goes can be had again: it is scored once more.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

FILE = Path("cache") / "reference.sqlite"  # In a pipeline's store.
PATIENCE = 60.0  # Seconds that a writer waits for another one.


def use(path: Path, key: str, now: float) -> None:
    """Makes the tables where they are not there, and notes that somebody asks for the scores of `key`.

    Args:
        now: seconds since 1970.
    """
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as db, db:
        db.execute(
            "create table if not exists scores (key text, pair text, chosen real, rejected real, digest text, "
            "primary key (key, pair)) without rowid"
        )
        db.execute("create table if not exists used (key text primary key, at real) without rowid")
        db.execute("drop table if exists reference")  # Of earlier versions, without digests.
        db.execute("insert or replace into used values (?, ?)", (key, now))


def forget(path: Path, newest: int, since: float) -> int:
    """Deletes the scores of all keys but the `newest` that were asked for last, and those asked for after `since`.

    The file keeps its size, and what is scored next is written into the room that is free now. A file that is damaged
    is left to the next stage that scores, which sets it aside.

    Args:
        since: seconds since 1970.

    Returns:
        how many scores went.

    Raises:
        sqlite3.OperationalError: a lock, or a full disk.
    """
    if not path.exists():
        return 0
    stay = "select key from used where at > ? union select key from (select key from used order by at desc limit ?)"
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as db, db:
            known = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
            if not {"scores", "used"} <= known:
                return 0
            gone = db.execute(f"delete from scores where key not in ({stay})", (since, newest)).rowcount
            db.execute(f"delete from used where key not in ({stay})", (since, newest))
            return gone
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return 0
