"""The plots of an evaluation, and answers side by side."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_assets.checks.evidence.candidate import ScoredPairs
from dpo_assets.checks.reports import Divergence
from dpo_assets.report.score_plots import POINTS, drawable, rank_correlation, score_plots
from dpo_assets.report.scores import answers_table, distance_table, perplexity_table
from dpo_assets_tests.samples import champion_scores, evaluation_report, neutral, scored_pairs

TITLES = ["margins", "displacement", "length against margin"]
MOST_BYTES = 60_000


def read(path: Path, **of: object) -> ScoredPairs:
    scored_pairs(0.7, **of).write_parquet(path / "scores.parquet")  # type: ignore[arg-type]
    return ScoredPairs.read(path / "scores.parquet")


def image(markdown: str) -> bytes:
    found = re.fullmatch(r"!\[[^\]]+\]\(data:image/png;base64,(?P<data>[A-Za-z0-9+/=]+)\)", markdown)
    assert found, markdown[:80]
    return base64.b64decode(found["data"])


def test_an_evaluation_shows_its_margins_what_moved_and_whether_length_explains_it(tmp_path: Path) -> None:
    alone = score_plots(read(tmp_path))
    assert list(alone) == TITLES
    assert all(image(plot).startswith(b"\x89PNG") for plot in alone.values())
    beside = score_plots(read(tmp_path, champion=0.4))
    assert image(beside["margins"]) != image(alone["margins"]), "the champion is drawn"
    assert beside["displacement"] == alone["displacement"]


def test_plots_stay_small_however_many_pairs_there_are(tmp_path: Path) -> None:
    plots = score_plots(read(tmp_path, champion=0.5, prompts=20 * POINTS))
    assert [len(plot) < MOST_BYTES for plot in plots.values()] == [True, True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_none_have_no_place_in_a_plot(tmp_path: Path, bad: float) -> None:
    whole = read(tmp_path)
    some = {name: [bad, *values[1:]] for name, values in whole.columns.items() if name.startswith("policy")}
    none = {name: [bad] * len(values) for name, values in whole.columns.items() if name.startswith("policy")}
    assert list(score_plots(ScoredPairs(whole.conversations, {**whole.columns, **some}))) == TITLES
    assert list(score_plots(ScoredPairs(whole.conversations, {**whole.columns, **none}))) == ["margins"]


def test_a_scatter_has_a_bounded_number_of_points_from_all_over() -> None:
    many = list(map(float, range(10 * POINTS + 1)))
    left, right = drawable(many, many)
    assert POINTS / 2 < len(left) <= POINTS
    assert (left[0], left[-1] > 9.9 * POINTS, left.tolist()) == (0.0, True, right.tolist())
    assert len(drawable(many)[0]) == len(many), "a histogram counts all of them"


def test_pairs_that_are_all_alike_are_drawn_too() -> None:
    alike = {name: [-2.0] * 3 for name in ("policy_chosen", "policy_rejected", "sft_chosen", "sft_rejected")} | {
        "chosen_tokens": [4.0] * 3,
        "rejected_tokens": [4.0] * 3,
    }
    plots = score_plots(ScoredPairs(["a", "b", "c"], alike))
    assert list(plots) == TITLES
    shown = imread(io.BytesIO(image(plots["margins"])))
    blue = int((shown[..., 2] > shown[..., 0] + 0.3).sum())
    assert blue > 300, "more than the line of the legend"


def test_ranks_are_correlated_and_not_values() -> None:
    grows = np.exp(np.arange(10.0))
    assert rank_correlation(list(range(10)), grows.tolist()) == pytest.approx(1.0)
    assert rank_correlation(list(range(10)), (-grows).tolist()) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 2, 3], [5, 6, 6, math.nan]) == pytest.approx(0.5)
    # Mean ranks 2 2 2 4 5.5 5.5 and 1 6 2 3.5 3.5 5: products about the mean sum to 5.25, the squares to 15 and 17.
    assert rank_correlation([1, 1, 1, 2, 3, 3], [2, 9, 4, 7, 7, 8]) == pytest.approx(5.25 / math.sqrt(15 * 17))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([], []))


def test_answers_of_sft_policy_and_champion_stand_side_by_side() -> None:
    row = {"prompt": [{"role": "user", "content": "Why?"}], "sft": "Because.", "policy": "It is so."}
    assert answers_table([row]).splitlines()[::2] == [
        "| prompt (last message) | SFT | policy |",
        "| Why? | Because. | It is so. |",
    ]
    both = answers_table([row | {"champion": "Well."}]).splitlines()
    assert both[0] == "| prompt (last message) | SFT | policy | champion |"
    assert both[2] == "| Why? | Because. | It is so. | Well. |"
    assert answers_table([]).splitlines()[0] == "| prompt (last message) | SFT | policy | champion |"


def test_the_champions_perplexities_and_its_kl_stand_beside_the_policys() -> None:
    theirs = champion_scores(neutral=neutral(1.07), chosen=neutral(1.2), kl={"per_token": 0.3})
    report = evaluation_report(champion="c" * 64, champion_scores=theirs, chosen=neutral(1.3))
    shown = perplexity_table(report).splitlines()
    assert [cell.strip() for cell in shown[2].split("|")[1:-1]] == [
        "neutral texts", "policy", "60 of 3000 tokens", "20", "20.4", "1.020", r"\[1.000, 1.040\]",
    ]  # fmt: skip
    assert shown[3].startswith("| neutral texts | champion | 60 of 3000 tokens | 20 | 21.4 | 1.070 |")
    assert shown[4].startswith("| chosen answers | policy | 60 of 3000 tokens | 20 | 26 | 1.300 |")
    assert shown[5].startswith("| chosen answers | champion | 60 of 3000 tokens | 20 | 24 | 1.200 |")
    kl = distance_table(report, None, None).splitlines()[2]
    assert kl.endswith(r"| 0.0200 \[0.0100, 0.0300\] | 0.3000 - |")
    in_training = distance_table(report, Divergence(per_token=0.5), Divergence(per_token=0.6)).splitlines()[2]
    assert in_training.endswith("| 0.5000 - | 0.6000 - |")
    unasked = evaluation_report(neutral={"not_measured": "no neutral texts were asked"})
    assert perplexity_table(unasked) == "not measured"
