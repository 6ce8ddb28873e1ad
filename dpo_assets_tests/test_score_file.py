"""Kept scores of models that nobody scores any more go; everything else stays."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dpo_assets.score_file import forget, use


def scored(path: Path, at: dict[str, float]) -> None:
    """Two scores of each key, asked for at these times."""
    for key, when in at.items():
        use(path, key, when)
        with closing(sqlite3.connect(path)) as db, db:
            db.executemany("insert into scores values (?, ?, 0, 0, '')", [(key, "a"), (key, "b")])


def keys(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as db:
        return {key for (key,) in db.execute("select key from scores union select key from used")}


@pytest.mark.parametrize(
    ("newest", "since", "stay"),
    [(1, 99.0, "d"), (3, 99.0, "bcd"), (9, 99.0, "abcd"), (1, 2.5, "cd"), (0, 2.5, "cd"), (0, 99.0, "")],
)
def test_the_scores_that_were_asked_for_last_stay(tmp_path: Path, newest: int, since: float, stay: str) -> None:
    path = tmp_path / "scores.sqlite"
    scored(path, {"d": 4.0, "a": 1.0, "c": 3.0, "b": 2.0})
    assert forget(path, newest, since) == 2 * (4 - len(stay))
    assert keys(path) == set(stay)


def test_a_model_that_is_asked_for_again_is_no_old_one(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    scored(path, {"a": 1.0, "b": 2.0})
    use(path, "a", 3.0)
    forget(path, 1, 99.0)
    assert keys(path) == {"a"}


@pytest.mark.parametrize("content", [None, b"", b"no database at all " * 200])
def test_where_nothing_is_kept_nothing_goes_and_a_damaged_file_is_left_for_the_next_stage(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "scores.sqlite"
    if content is not None:
        path.write_bytes(content)
    assert forget(path, 1, 99.0) == 0
    assert (path.read_bytes() if path.exists() else None) == content
