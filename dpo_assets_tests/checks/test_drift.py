"""Drift between windows of feedback: what moved is told with its interval, and chance is not called drift."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.drift import feedback_drift
from dpo_assets.checks.evidence.drift import DriftReport, difference_of_means, drift_report
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError
from dpo_assets.feedback import dated as dated_module
from dpo_assets.feedback.batches import PAIR_ID, keys_frame
from dpo_assets.feedback.dated import WINDOWS, DatedPairs, dated_pairs
from dpo_assets.feedback.facts import day_of
from dpo_assets.feedback.pair import Pair
from dpo_assets.feedback.quality_sources import models
from dpo_assets.feedback.tables import pairs_frame
from dpo_assets.recipe import BandOverride
from dpo_assets.report.drift import drift_views
from dpo_assets_tests.samples import assistant, pair

NOW = date(2026, 11, 27)
DAYS = 10


def dated(number: int, ago: int, chosen: int = 10, rejected: int = 10, **changes: Any) -> Pair:
    """A pair of so many days ago, whose answers have so many letters."""
    values = {"created_at": f"{NOW - timedelta(days=ago)}T10:00:00+00:00", **changes}
    return pair(number, chosen=[assistant("c" * chosen)], rejected=[assistant("r" * rejected)], **values)


def read(pairs: list[Pair]) -> DatedPairs:
    """Letters stand for tokens."""
    table = pairs_frame(pairs)
    lengths = {
        f"{side}_tokens": pl.Series([len(answer[0]["content"]) for answer in table[side].to_list()], dtype=pl.UInt32)
        for side in ("chosen", "rejected")
    }
    won = [models(meta) for meta in table["meta"]]
    facts = table.select("group_id", "source", "user", "margin", day=day_of()).with_columns(
        **lengths,
        winner=pl.Series([one for one, _ in won], dtype=pl.String),
        loser=pl.Series([other for _, other in won], dtype=pl.String),
    )
    return dated_pairs(keys_frame(table).select(PAIR_ID).hstack(facts), DAYS, NOW)


def judged(pairs: list[Pair], **numbers: float) -> tuple[Verdict, DriftReport]:
    bands = default_bands()
    if numbers:
        bands = bands.with_overrides({"feedback_drift": BandOverride(numbers=numbers, reason="numbers of a test")})
    report = drift_report(read(pairs), int(bands.limit("feedback_drift")["conversations"]), 0.95)
    kept = json.loads(json.dumps(report.model_dump(mode="json")))
    return feedback_drift({"drift": kept}, bands), report


Changes = Callable[[int], dict[str, Any]]


def two_windows(now: Changes, before: Changes, n: int = 80) -> list[Pair]:
    draw = random.Random(1)

    def one(number: int, ago: int, changes: dict[str, Any]) -> Pair:
        lengths = {"chosen": draw.randint(8, 12), "rejected": draw.randint(8, 12)}
        return dated(number, ago, **{**lengths, "margin": draw.gauss(1.0, 0.5)} | changes)

    return [
        *(one(k, k % DAYS, now(k)) for k in range(n)),
        *(one(k + n, DAYS + k % DAYS, before(k)) for k in range(n)),
    ]


def nothing(_: int) -> dict[str, Any]:
    return {}


MOVED: dict[str, tuple[Changes, Changes]] = {
    "all, longer won": (lambda _: {"rejected": 20}, nothing),
    "all, length": (lambda _: {"chosen": 15, "rejected": 15}, nothing),
    "all, margin": (lambda k: {"margin": 3.0 + k % 2}, nothing),
    "source new.jsonl, share of pairs": (
        lambda k: {"source": "new.jsonl" if k % 2 else "old.jsonl"},
        lambda k: {"source": "old.jsonl" if k else "new.jsonl"},
    ),
    "user ann, longer won": (
        lambda k: {"user": "ann" if k % 2 else "bob", "rejected": 20 if k % 2 else 10, "chosen": 10 if k % 2 else 19},
        lambda k: {"user": "ann" if k % 2 else "bob", "chosen": 10, "rejected": 9 if k % 2 else 10},
    ),
    "model small, win rate": (
        lambda _: {"meta": {"chosen_model": "large", "rejected_model": "small"}},
        lambda k: {"meta": {"chosen_model": ("small", "large")[k % 2], "rejected_model": ("large", "small")[k % 2]}},
    ),
}


@pytest.mark.parametrize("what", MOVED)
def test_what_moved_between_two_windows_is_told_with_its_interval(what: str) -> None:
    now, before = MOVED[what]
    verdict, report = judged(two_windows(now, before))
    assert verdict.level == "warn"
    assert what in verdict.fix
    [shift] = [s for s in report.shifts if f"{s.part}, {s.measure}" == what]
    assert shift.low is not None and shift.high is not None and shift.low * shift.high > 0  # noqa: PT018
    assert shift.low <= shift.difference <= shift.high
    # The recipe's own numbers decide how much is too much.
    assert judged(two_windows(now, before), share=1.0, length=100.0, margin=100.0)[0].level == "pass"


def test_feedback_that_goes_on_as_it_was_is_no_drift_and_its_numbers_are_shown() -> None:
    verdict, report = judged(two_windows(nothing, nothing))
    assert verdict.level == "pass"
    assert verdict.value == "0 of 3 measures moved"
    assert "2026-11-18 to 2026-11-27: 80 pairs in 80 conversations against 2026-11-08 to 2026-11-17" in verdict.note
    views = drift_views(report, default_bands().limit("feedback_drift"))
    assert "| all | length |" in views["newest window against the one before"]
    assert views["feedback by window"].startswith("![feedback by window](data:image/png;base64,")


def test_a_measure_is_judged_as_one_of_several() -> None:
    """By Holm: of three measures the least likely one has three times its own p."""
    pairs = two_windows(lambda k: {"rejected": 12 if k % 3 else 10}, nothing)
    _, report = judged(pairs)
    rows = read(pairs).rows
    samples = []
    for window in (rows.filter(window=0), rows.filter(window=1)):
        longer = (window["chosen_tokens"].cast(int) - window["rejected_tokens"].cast(int)).sign() / 2
        samples.append((longer.to_list(), window["group_id"].to_list()))
    _, _, alone = difference_of_means(*samples, fewest=30, confidence=0.95)
    told = {shift.measure: shift.p for shift in report.shifts}
    assert alone is not None
    assert told["longer won"] == pytest.approx(3 * alone)
    assert told["longer won"] == min(p for p in told.values() if p is not None)


def test_too_few_conversations_show_nothing_however_many_pairs_they_have() -> None:
    turned = [dated(k % 20, k % DAYS, rejected=20, row=f"r{k}", chosen=5 + k) for k in range(100)]
    verdict, report = judged([*turned, *(dated(k, DAYS + k % DAYS) for k in range(100))])
    assert verdict.level == "pass"
    assert {shift.p for shift in report.shifts} == {None}
    assert "30 a window would tell" in verdict.note


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "no pair is dated (0 without a date)"),
        ([pair(1), pair(2, created_at="soon")], "no pair is dated (2 without a date)"),
        ([dated(1, 0)], "1 pairs in 1 conversations; 0 pairs without a date"),
    ],
)
def test_feedback_without_two_windows_passes_and_says_why(pairs: list[Pair], said: str) -> None:
    verdict, report = judged(pairs)
    assert (verdict.level, verdict.value) == ("pass", "no two windows to compare")
    assert said in verdict.note
    assert drift_views(report, default_bands().limit("feedback_drift")) == {}


def test_a_recipe_without_windows_passes_and_a_dataset_of_an_earlier_version_is_refused() -> None:
    assert feedback_drift({"drift": None}, default_bands()).note == "feedback.drift_days is 0"
    with pytest.raises(ConfigError, match="materialise it again"):
        feedback_drift({}, default_bands())


def test_windows_hold_each_dated_pair_once_and_reach_back_as_far_as_they_say() -> None:
    pairs = [dated(0, 0), dated(0, 0, row="again"), dated(1, DAYS - 1), dated(2, DAYS), dated(3, WINDOWS * DAYS - 1)]
    pairs += [dated(4, WINDOWS * DAYS), dated(5, -5), pair(6)]
    found = read(pairs)
    assert (found.newest, found.undated) == (NOW, 1)
    assert found.counts == {0: 2, 1: 1, WINDOWS - 1: 1}
    assert found.bounds(1) == (date(2026, 11, 8), date(2026, 11, 17))
    assert sorted(found.rows["window"]) == [0, 0, 1, WINDOWS - 1]


def test_the_interval_of_a_difference_holds_it_as_often_as_it_says_where_conversations_agree() -> None:
    """Conversations of 1 to 9 agreeing pairs, a third of them in both windows; 400 draws of no difference."""
    draw, held, low_p = np.random.default_rng(0), 0, 0
    for _ in range(400):
        means, sizes = draw.normal(size=90), draw.integers(1, 10, size=90)
        samples = []
        for mine in (range(60), range(30, 90)):
            groups = [f"g{g}" for g in mine for _ in range(sizes[g])]
            values = [float(means[g] + 0.5 * draw.normal()) for g in mine for _ in range(sizes[g])]
            samples.append((values, groups))
        _, ends, p = difference_of_means(*samples, fewest=30, confidence=0.95)
        assert ends is not None and p is not None  # noqa: PT018
        held += ends[0] <= 0 <= ends[1]
        low_p += p <= 0.05
    assert 0.93 <= held / 400 <= 0.98
    assert low_p == 400 - held


@pytest.mark.parametrize(
    "name",
    ["{day}/votes.jsonl", "votes-{month}.jsonl", "part-{number:05d}.parquet", "votes_{month}T101500.jsonl"],
)
def test_files_that_belong_to_a_time_are_one_source_and_no_drift(name: str) -> None:
    def of(first: date, k: int) -> dict[str, Any]:
        day = first - timedelta(days=k % DAYS)
        return {"source": name.format(day=day, month=f"{day:%Y-%m}", number=day.toordinal() % 97)}

    now, before = NOW, NOW - timedelta(days=DAYS + 5)
    pairs = two_windows(lambda k: of(now, k), lambda k: of(before, k))
    verdict, report = judged([*pairs, *(dated(900 + k, k % (2 * DAYS), source="fixed.jsonl") for k in range(40))])
    assert verdict.level == "pass", verdict.fix
    assert [shift.measure for shift in report.shifts if "*" in shift.part] == ["share of pairs", "longer won"]


def test_a_file_of_one_window_alone_has_no_share_of_pairs_that_could_move() -> None:
    verdict, report = judged(two_windows(lambda _: {"source": "november.jsonl"}, lambda _: {"source": "october.jsonl"}))
    assert verdict.level == "pass", verdict.fix
    assert not [shift for shift in report.shifts if shift.measure == "share of pairs"]


def test_pairs_and_conversations_of_a_window_are_of_all_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dated_module, "MOST_MEASURED", 30)
    verdict, report = judged(two_windows(nothing, nothing))
    assert {shift.pairs for shift in report.shifts} == {(30, 30)}
    assert [(window.pairs, window.conversations) for window in report.windows] == [(80, 80)] * 2
    assert "80 pairs in 80 conversations" in verdict.note
