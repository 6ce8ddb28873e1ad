"""Checks of what was read: a file that drops out, a row that is lost, feedback that shrinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dpo_assets.checks.ingest import every_file_read, every_row_accounted_for, feedback_volume, ingest_verdicts, volumes
from dpo_assets.checks.verdict import Verdict
from dpo_assets.feedback.accounting import Held, HeldPaired
from dpo_assets_tests.samples import recipe

FEEDBACK = recipe().feedback
HELD = Held(pairs=5, answers=2, rejected=3, lines=10, strangers=0)
PAIRED = HeldPaired(pairs=2, rejected=1, left=1)
Given = tuple[str, str, int]  # Source, file, rows.
A, B, C = ("votes", "a.jsonl", 100), ("votes", "b.jsonl", 100), ("table", "c.jsonl", 1000)


def counted(file: str = "a.jsonl", **changes: Any) -> dict[str, Any]:
    """What is noted of a file of ten rows."""
    row = {"file": file, "unread": "", "rows": 10, "lines": 10, "rows_in": 10}
    return row | {"pairs": 5, "answers": 2, "rejected": 3} | changes


def indexed(*files: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What is noted of files; of each two judged answers one is in a pair, and one was left."""
    made = {"used": 2 * len(files) - 1, "pairs": 2, "rejected": 1}
    return {"found": [row["file"] for row in files], "files": list(files), "paired": made} | changes


def good_ingest() -> list[Verdict]:
    return ingest_verdicts(indexed(counted()), {"a.jsonl": HELD}, PAIRED, volumes([A]), None, FEEDBACK)


def bad_ingest() -> list[Verdict]:
    """What every check of `raw_preferences` fails."""
    unread = counted(rows=0, lines=0, unread="empty_file: it holds no byte")
    return ingest_verdicts(indexed(unread), {"a.jsonl": HELD}, PAIRED, volumes([]), volumes([A]), FEEDBACK)


def test_a_file_that_was_refused_is_named_with_its_reason_and_the_ways_out() -> None:
    assert every_file_read(indexed(counted())).level == "pass"
    verdict = every_file_read(indexed(counted(), counted("b.jsonl", unread="changed: it is written")))
    assert (verdict.level, verdict.value) == ("error", "1 of 2 files read")
    assert "b.jsonl (changed: it is written)" in verdict.fix
    assert "a.jsonl" not in verdict.fix
    assert "checks.severity.every_file_read" in verdict.fix


def test_a_whole_export_of_nothing_is_noted_and_no_fault() -> None:
    verdict = every_file_read(indexed(counted(), counted("b.json", empty=True, rows=0)))
    assert (verdict.level, verdict.note) == ("pass", "1 whole files without a row: b.json")


def test_of_many_refused_files_some_are_named_and_the_others_counted() -> None:
    many = [counted(f"{n}.jsonl", unread="empty_file: it holds no byte") for n in range(30)]
    assert every_file_read(indexed(*many)).fix.count("empty_file") == 8
    assert "; and 22 more" in every_file_read(indexed(*many)).fix


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lines": 9}, "10 rows were seen, 9 lie in its tables"),
        ({"lines": 11}, "10 rows were seen, 11 lie in its tables"),
        ({"pairs": 4}, "5 pairs were made, 4 lie in its tables"),
        ({"answers": 3}, "2 answers were made, 3 lie in its tables"),
        ({"rejected": 2}, "3 rejected were made, 2 lie in its tables"),
        ({"strangers": 1}, "1 rows in its tables name another file"),
    ],
)
def test_a_row_that_is_not_in_the_tables_is_missed_and_its_file_named(changes: dict[str, int], said: str) -> None:
    index = indexed(counted("good.jsonl"), counted())
    tables = {"good.jsonl": HELD, "a.jsonl": replace(HELD, **changes)}
    answers = sum(one.answers for one in tables.values())
    index["paired"]["used"] = answers - 1
    verdict = every_row_accounted_for(index, tables, PAIRED)
    assert verdict.level == "error"
    assert f"a.jsonl: {said}" in verdict.fix
    assert "good" not in verdict.fix


def test_a_row_that_led_to_nothing_is_missed_also_where_another_has_its_line() -> None:
    verdict = every_row_accounted_for(indexed(counted(rows=11)), {"a.jsonl": HELD}, PAIRED)
    assert "11 rows were seen, which led to 10 pairs" in verdict.fix


def test_a_file_that_was_found_and_not_read_is_missed_and_one_that_was_read_twice_is_seen() -> None:
    index = indexed(counted()) | {"found": ["a.jsonl", "b.jsonl"]}
    assert "b.jsonl: found, and not read" in every_row_accounted_for(index, {"a.jsonl": HELD}, PAIRED).fix
    index = indexed(counted()) | {"found": []}
    assert "a.jsonl: read, and not found" in every_row_accounted_for(index, {"a.jsonl": HELD}, PAIRED).fix
    assert "it has no table" in every_row_accounted_for(indexed(counted()), {}, None).fix


@pytest.mark.parametrize(
    ("made", "paired", "said"),
    [
        ({"used": 0}, PAIRED, "2 answers were judged, 0 are in a pair and 1 in quarantine"),
        ({"used": 2}, PAIRED, "2 answers were judged, 2 are in a pair and 1 in quarantine"),
        ({}, replace(PAIRED, pairs=1), "2 pairs were made, 1 lie in the table"),
        ({}, replace(PAIRED, rejected=2), "1 rejected were made, 2 lie in the table"),
        (None, None, "2 answers were judged, and nothing was made of them"),
    ],
)
def test_an_answer_that_is_in_no_pair_and_not_in_quarantine_is_missed(
    made: dict[str, int] | None, paired: HeldPaired | None, said: str
) -> None:
    index = indexed(counted())
    index["paired"] = None if made is None else index["paired"] | made
    verdict = every_row_accounted_for(index, {"a.jsonl": HELD}, paired)
    assert verdict.level == "error"
    assert f"paired answers: {said}" in verdict.fix


def volume(*now: Given, **settings: Any) -> Verdict:
    """Held against two files of one source with 100 rows each, and one of another with 1,000."""
    return feedback_volume(volumes(now), volumes([A, B, C]), FEEDBACK.model_copy(update=settings))


def test_feedback_that_grows_or_is_the_first_is_no_fall() -> None:
    assert feedback_volume(volumes([A]), None, FEEDBACK).level == "pass"
    assert volume(A, B, C).level == "pass"
    assert volume(A, ("votes", "b.jsonl", 500), C, ("new", "d.jsonl", 1)).level == "pass"


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ([A, ("votes", "b.jsonl", 79), C], "votes (200 rows in 2 files before, 179 in 2 now)"),
        ([A, ("votes", "b.jsonl", 79), ("table", "c.jsonl", 9000)], "votes (200 rows in 2 files before, 179 in 2 now)"),
        ([A, B], "table (1000 rows in 1 files before, 0 in 0 now)"),
        ([("votes", "a.jsonl", 199), C], "votes (200 rows in 2 files before, 199 in 1 now)"),
        ([("votes", "a.jsonl", 900), C], "votes (200 rows in 2 files before, 900 in 1 now)"),
        ([("votes", "a.jsonl", 900), ("votes", "b.jsonl", 0), C], "votes (200 rows in 2 files before, 900 in 2 now)"),
        ([("votes", "a.jsonl", 900), ("votes", "d.jsonl", 1), C], "votes (200 rows in 2 files before, 901 in 2 now)"),
    ],
    ids=[
        "rows",
        "rows, though another source grew",
        "a whole source",
        "a whole file",
        "a file, though another grew",
        "all rows of a file, though another grew",
        "a file, though another grew and a small one came",
    ],
)
def test_a_source_that_lost_rows_or_a_file_is_named(now: list[Given], said: str) -> None:
    verdict = volume(*now)
    assert verdict.level == "error"
    assert said in verdict.fix


def test_a_small_fall_and_a_renamed_export_pass_and_the_bound_is_the_recipes() -> None:
    fallen = (A, ("votes", "b.jsonl", 81), C)
    assert volume(*fallen).level == "pass"
    assert volume(*fallen, max_row_fall=0.05).level == "error"
    renamed = volume(A, ("votes", "b2.jsonl", 95), C)
    assert (renamed.level, renamed.note) == ("pass", "files that were there before: b.jsonl")


def test_files_that_were_put_together_are_no_loss_and_the_fix_names_the_setting_that_lets_a_file_go() -> None:
    assert volume(("votes", "all.jsonl", 200), C).level == "pass"
    assert "feedback.max_row_fall" in volume(A, C).fix
    assert volume(A, C, max_row_fall=1.0).level == "pass"


def test_volumes_of_an_earlier_version_are_compared_by_their_sums() -> None:
    before = {"votes": {"files": 1, "rows": 100, "names": ["a.jsonl"]}}
    assert feedback_volume(volumes([A]), before, FEEDBACK).level == "pass"
    assert feedback_volume(volumes([("votes", "a.jsonl", 50)]), before, FEEDBACK).level == "error"


def test_of_a_source_of_many_files_some_names_are_kept() -> None:
    [kept] = volumes([("votes", f"{n}.jsonl", 2) for n in range(1_000)]).values()
    assert (kept["files"], kept["rows"], len(kept["names"])) == (1_000, 2_000, 200)
