"""Sources from outside: what is seen of each kind, what is read for it, what a broken one costs the others."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import dpo_assets.feedback.watching as watching
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.watching import Content, Look, Shelf, new_pairs, watch
from dpo_assets.recipe import FeedbackSource, SqlSource
from dpo_assets_tests.pipelines import trl_feedback

NOW = 1_800_000_000.0
OLD = NOW - 1000


def settled(path: Path, at: float = OLD) -> Path:
    os.utime(path, (at, at))
    return path


def seen(*sources: FeedbackSource, shelf: Shelf | None = None, now: float = NOW) -> list[Look]:
    return watch(sources, shelf if shelf is not None else Shelf(), now)


def only(path: Path, shelf: Shelf | None = None, now: float = NOW) -> Look:
    [look] = seen(FeedbackSource(path=str(path)), shelf=shelf, now=now)
    return look


def counted(look: Look, shelf: Shelf, read: Content | None = None, enough: int = 10**9) -> int | None:
    return new_pairs(look, read, shelf, enough, ReadOptions())


def test_a_file_that_was_only_touched_is_as_it_was(tmp_path: Path) -> None:
    shelf, path = Shelf(), settled(trl_feedback(tmp_path / "a.jsonl"))
    before = only(path, shelf)
    assert before.content is not None
    settled(path, OLD + 9)
    assert only(path, shelf).content == before.content
    settled(trl_feedback(path, pairs=3))
    assert only(path, shelf).content != before.content


def test_a_file_whose_time_lies_in_the_future_waits_one_tick_and_not_for_ever(tmp_path: Path) -> None:
    shelf, path = Shelf(), settled(trl_feedback(tmp_path / "a.jsonl"), NOW + 10**8)
    assert only(path, shelf).busy
    assert only(path, shelf, NOW + 3).busy
    later = only(path, shelf, NOW + 6)
    assert not later.busy
    assert later.content is not None


def test_a_file_that_grows_between_ticks_is_still_being_written(tmp_path: Path) -> None:
    shelf, path = Shelf(), trl_feedback(tmp_path / "a.jsonl", pairs=2)
    for n in range(3):
        settled(trl_feedback(path, pairs=3 + n), NOW + 60 * n)
        look = only(path, shelf, NOW + 60 * n + 1)
        assert (look.busy, look.content) == (True, None)
    assert not only(path, shelf, NOW + 200).busy


def test_a_thousand_files_are_hashed_once_and_a_tick_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(1000):
        path = tmp_path / f"{n:04}.jsonl"
        path.write_text(json.dumps({"n": n}) + "\n", encoding="utf-8")
        settled(path)
    shelf, hashed = Shelf(), []
    real = watching.digest_of
    monkeypatch.setattr(watching, "digest_of", lambda path, *more: (hashed.append(path), real(path, *more))[1])
    pattern = tmp_path / "*.jsonl"
    first = only(pattern, shelf)
    assert len(hashed) == 1000
    shelf.keep(tmp_path / "shelf.json")
    began = time.process_time()
    again = Shelf.at(tmp_path / "shelf.json")
    second = only(pattern, again)
    spent = time.process_time() - began
    assert (second.content, len(hashed)) == (first.content, 1000)
    assert spent < 1.0  # 0.06 s of a core were seen.
    settled(path, OLD + 1)
    only(pattern, again)
    assert len(hashed) == 1001


def test_a_damaged_shelf_costs_hashing_again_and_nothing_else(tmp_path: Path) -> None:
    path, kept = settled(trl_feedback(tmp_path / "a.jsonl")), tmp_path / "shelf.json"
    shelf = Shelf()
    look = only(path, shelf)
    shelf.keep(kept)
    kept.write_text(kept.read_text(encoding="utf-8")[:50], encoding="utf-8")
    assert Shelf.at(kept) == Shelf()
    assert only(path, Shelf.at(kept)).content == look.content


def test_new_pairs_are_the_valid_ones_of_what_was_not_read(tmp_path: Path) -> None:
    shelf, path = Shelf(), settled(trl_feedback(tmp_path / "a.jsonl", pairs=20))
    look = only(path, shelf)
    assert counted(look, shelf) == 20
    shelf.was_read()
    trl_feedback(path, pairs=25)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "no answers"}\nno row\n')
    grown = only(settled(path), shelf)
    assert counted(grown, shelf) == 5


def test_a_file_that_was_replaced_is_new_as_a_whole(tmp_path: Path) -> None:
    shelf, path = Shelf(), settled(trl_feedback(tmp_path / "a.jsonl", pairs=20))
    counted(only(path, shelf), shelf)
    shelf.was_read()
    text = trl_feedback(path, pairs=20).read_text(encoding="utf-8")
    path.write_text(text.replace("happy", "sad"), encoding="utf-8")
    assert counted(only(settled(path), shelf), shelf) == 20


def test_counting_stops_at_enough_and_reads_no_file_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        settled(trl_feedback(tmp_path / f"{n}.jsonl", pairs=10 + n))
    shelf, read = Shelf(), []
    real = watching.pairs_in
    monkeypatch.setattr(watching, "pairs_in", lambda path, *more: (read.append(path.name), real(path, *more))[1])
    look = only(tmp_path / "*.jsonl", shelf)
    assert counted(look, shelf, enough=15) == 21
    assert read == ["0.jsonl", "1.jsonl"]
    assert counted(look, shelf) == 33
    assert read == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_a_large_file_that_has_grown_is_estimated_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, path = Shelf(), settled(trl_feedback(tmp_path / "a.jsonl", pairs=100))
    counted(only(path, shelf), shelf)
    shelf.was_read()
    monkeypatch.setattr(watching, "COUNTED_BYTES", 100)
    grown = counted(only(settled(trl_feedback(path, pairs=150)), shelf), shelf)
    assert grown is not None
    assert 45 <= grown <= 55
    path.rename(tmp_path / "b.jsonl")
    assert counted(only(tmp_path / "b.jsonl", shelf), shelf) is None


def test_a_table_shows_its_watermark_and_counts_its_rows(tmp_path: Path) -> None:
    database = tmp_path / "votes.db"
    source = FeedbackSource(sql=SqlSource(database=str(database), table="votes", id="id", watermark="at"))
    with sqlite3.connect(database) as votes:
        votes.execute("CREATE TABLE votes (id INTEGER, at TEXT)")
        votes.execute("INSERT INTO votes VALUES (1, '2026-01-01')")
    [first] = seen(source)
    with sqlite3.connect(database) as votes:
        votes.execute("UPDATE votes SET at = '2026-01-02'")
    [voted_again] = seen(source)
    with sqlite3.connect(database) as votes:
        votes.executemany("INSERT INTO votes VALUES (?, '2026-01-03')", [(2,), (3,)])
    [grown] = seen(source)
    assert first.content != voted_again.content != grown.content
    assert counted(grown, Shelf(), first.content) == 2


def test_a_dataset_of_the_hub_changes_with_its_revision() -> None:
    first, again, other = (seen(FeedbackSource(hub="org/votes", revision=r * 40))[0] for r in "aab")
    assert first.content == again.content
    assert first.content is not None
    assert other.content is not None
    assert first.content.digest != other.content.digest


class _Side(BaseHTTPRequestHandler):
    """Files with and without an entity tag, and one that is never answered."""

    tag = "one"
    released = threading.Event()

    def do_GET(self) -> None:
        if "silent" in self.path:
            self.released.wait(30)
            return
        self.send_response(200)
        if "tagged" in self.path:
            self.send_header("ETag", f'"{self.tag}"')
        self.send_header("Content-Length", "3")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"{}\n")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def side() -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec needs aiohttp for http://")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Side)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    _Side.released.set()
    server.shutdown()
    server.server_close()


def test_a_silent_server_and_a_missing_file_hold_up_nobody(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LOOK_SECONDS", 1.0)
    monkeypatch.setattr(_Side, "tag", "one")
    sources = [
        FeedbackSource(path=f"{side}/silent.jsonl"),
        FeedbackSource(path=str(tmp_path / "none.jsonl")),
        FeedbackSource(path=f"{side}/tagged.jsonl"),
        FeedbackSource(path=str(settled(trl_feedback(tmp_path / "a.jsonl")))),
    ]
    began = time.monotonic()
    silent, missing, tagged, local = seen(*sources)
    assert time.monotonic() - began < 15
    assert "did not answer" in silent.fault
    assert "matches no file" in missing.fault
    assert tagged.content is not None
    assert local.content is not None
    monkeypatch.setattr(_Side, "tag", "two")
    assert seen(sources[2])[0].content != tagged.content
