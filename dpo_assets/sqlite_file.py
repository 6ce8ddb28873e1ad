"""SQLite files of what can be had again: a damaged one must not stop every run."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def prepare_sound(path: Path, prepare: Callable[[], object]) -> Path | None:
    """Runs `prepare`, which makes the file or looks into it, and once more on a new one where it is damaged.

    Returns:
        where the damaged file went.

    Raises:
        sqlite3.OperationalError: a lock, or a full disk: the file itself is well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        prepare()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        aside = path.with_name(f"{path.name}.damaged-{uuid4().hex[:8]}")
        path.rename(aside)
        prepare()
        return aside
    return None
