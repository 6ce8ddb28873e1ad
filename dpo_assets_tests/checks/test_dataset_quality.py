"""Checks on a dataset's pairs: where each limit lies, what lifts it, and that the way out leads out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.catalog import CHECK_BY_NAME
from dpo_assets.checks.dataset_quality import quality_verdicts, sft_weight
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import DpoSection
from dpo_assets.report.quality import quality_views
from dpo_assets_tests.pipelines import failed_checks, materialize, metadata, trl_feedback, trl_recipe
from dpo_assets_tests.samples import dataset_report, quality

BANDS = default_bands()
DPO = DpoSection()
TO_DATASET = ("base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset")


def judged(check: str, dpo: DpoSection = DPO, report: dict[str, Any] = {}, **measures: Any) -> Verdict:
    verdicts = quality_verdicts(dataset_report(quality=quality(**measures), **report), dpo, BANDS)
    [verdict] = [verdict for verdict in verdicts if verdict.check == check]
    return verdict


def near(count: int) -> dict[str, dict[str, int]]:
    """1120 pairs, `count` of them just below a distance of 0.1."""
    return {"bins": {"9": count, "10": 1120 - count}}


def looped(count: int) -> dict[str, Any]:
    bins = {"29": 1120 - count, "30": count}
    return {"loops": bins, "other_loops": bins}


@pytest.mark.parametrize(
    ("check", "measures", "level"),
    [
        ("answers_truncated", {"truncation": {"share": 0.01}}, "pass"),
        ("answers_truncated", {"truncation": {"share": 0.011}}, "warn"),
        ("answers_truncated", {"truncation": {"share": 0.05}}, "warn"),
        ("answers_truncated", {"truncation": {"share": 0.051}}, "error"),
        ("answers_truncated", {"truncation": {"share": None, "needed": {}}}, "error"),
        ("pair_distance", {"distance": {"median": 0.3}}, "pass"),
        ("pair_distance", {"distance": {"median": 0.29}}, "warn"),
        ("pair_distance", {"distance": {"median": 0.0}}, "warn"),
        ("pair_distance", {"distance": near(112)}, "pass"),
        ("pair_distance", {"distance": near(113)}, "warn"),
        ("pair_distance", {"distance": near(560)}, "warn"),
        ("pair_distance", {"distance": near(561)}, "error"),
        ("pair_distance", {"distance": {"median": None}}, "error"),
        ("pair_distance", {"distance": {"median": math.nan}}, "error"),
        ("length_bias", {"lengths": {"ratio": 1.2}}, "pass"),
        ("length_bias", {"lengths": {"ratio": 1.21}}, "warn"),
        ("length_bias", {"lengths": {"ratio": 2.0}}, "warn"),
        ("length_bias", {"lengths": {"ratio": 2.01}}, "error"),
        ("length_bias", {"lengths": {"ratio": 1 / 1.2}}, "pass"),
        ("length_bias", {"lengths": {"ratio": 0.83}}, "warn"),
        ("length_bias", {"lengths": {"ratio": 0.49}}, "error"),
        ("length_bias", {"lengths": {"ratio": 0.0}}, "error"),
        ("length_bias", {"lengths": {"ratio": None}}, "error"),
        ("length_bias", {"lengths": {"auc": 0.6}}, "pass"),
        ("length_bias", {"lengths": {"auc": 0.61}}, "warn"),
        ("length_bias", {"lengths": {"auc": 1.0}}, "warn"),
        ("length_bias", {"lengths": {"auc": 0.39}}, "warn"),
        ("length_bias", {"lengths": {"auc": None}}, "error"),
        ("label_conflicts", {"contradictions": {"pairs": 12}}, "pass"),
        ("label_conflicts", {"contradictions": {"pairs": 13}}, "warn"),
        ("label_conflicts", {"contradictions": {"pairs": 361}}, "error"),
        ("degenerate_chosen", {"degenerate": {"others": 11}}, "pass"),
        ("degenerate_chosen", {"degenerate": {"others": 12, "no_end": 12}}, "warn"),
        ("degenerate_chosen", {"degenerate": {"others": 57, "template": 57}}, "error"),
        ("degenerate_chosen", {"degenerate": looped(11)}, "pass"),
        ("degenerate_chosen", {"degenerate": looped(12)}, "warn"),
        ("degenerate_chosen", {"degenerate": looped(57)}, "error"),
        ("too_easy", {"surface": {"auc": 0.9}}, "pass"),
        ("too_easy", {"surface": {"auc": 0.91}}, "warn"),
        ("too_easy", {"surface": {"auc": 1.0}}, "warn"),
        ("too_easy", {"surface": {"auc": 1.0}, "sample": 49}, "pass"),
        ("too_easy", {"surface": {"auc": None}}, "pass"),
    ],
)
def test_the_pairs_are_held_against_their_limits(check: str, measures: dict[str, Any], level: str) -> None:
    verdict = judged(check, **measures)
    assert (verdict.level, bool(verdict.fix)) == (level, level != "pass")


def test_exact_reversals_and_circles_are_counted_together_among_the_rows_read() -> None:
    verdict = judged("label_conflicts", report={"reasons": {"conflict": 8}}, contradictions={"pairs": 4})
    assert (verdict.value, verdict.level) == (0.01, "pass")
    assert judged("label_conflicts", report={"reasons": {"conflict": 9}}, contradictions={"pairs": 4}).level == "warn"


@pytest.mark.parametrize(
    ("dpo", "level"),
    [
        (DpoSection(), "error"),
        (DpoSection(loss="sigmoid", loss_weights=[5.0]), "error"),
        (DpoSection(loss=["sigmoid", "sft"]), "warn"),
        (DpoSection(loss=["sigmoid", "sft"], loss_weights=[1.0, 0.2]), "warn"),
        (DpoSection(loss=["sigmoid", "sft"], loss_weights=[1.0, 0.19]), "error"),
        (DpoSection(loss=["sft", "sigmoid"], loss_weights=[0.1, 1.0]), "error"),
    ],
)
def test_an_sft_term_lets_near_pairs_train_and_a_weak_one_does_not(dpo: DpoSection, level: str) -> None:
    assert judged("pair_distance", dpo, distance=near(1120)).level == level


@pytest.mark.parametrize("losses", ["sigmoid", ["sigmoid", "sft"], ["ipo", "bco_pair"], ["sft", "hinge"]])
def test_the_loss_that_is_named_as_the_way_out_is_one(losses: Any) -> None:
    weak = DpoSection(loss=losses, loss_weights=[0.1] * (1 if isinstance(losses, str) else len(losses)))
    fix = judged("pair_distance", weak, distance=near(1120)).fix
    names, weights = re.findall(r"\[(.*?)\]", fix)
    better = DpoSection(loss=names, loss_weights=[float(w) for w in weights.split(", ")])
    assert sft_weight(better) == 0.2
    assert [name for name in weak.losses if name not in better.losses] == []
    assert judged("pair_distance", better, distance=near(1120)).level == "warn"


def test_the_length_that_is_named_as_the_way_out_holds_enough_and_fits_the_model() -> None:
    assert "feedback.max_length to 900," in judged("answers_truncated", truncation={"share": 0.2}).fix
    small = judged("answers_truncated", truncation={"share": 0.2, "context": 512})
    assert "max_length to" not in small.fix
    assert "reads 512" in small.fix


def test_a_fault_of_every_kind_is_told_its_own_way_out() -> None:
    broken = judged(
        "degenerate_chosen",
        degenerate=looped(600) | {"others": 1200, "no_end": 300, "template": 300, "blank": 300, "misread": 300},
    )
    for way in ("EOS", "another chat template", "say nothing", "as UTF-8", "repeat themselves"):
        assert way in broken.fix
    assert "EOS" not in judged("degenerate_chosen", degenerate=looped(600)).fix
    unknown = judged("degenerate_chosen", degenerate={"ends_known": False})
    assert "names no EOS" in unknown.note


def test_a_dataset_of_an_earlier_version_is_judged_by_what_was_looked_for() -> None:
    report = dataset_report(quality=quality(degenerate={"others": 12, "no_end": 12}))
    del report["quality"]["degenerate"]["misread"]
    [verdict] = [v for v in quality_verdicts(report, DPO, BANDS) if v.check == "degenerate_chosen"]
    assert verdict.level == "warn"
    assert "misread letters were not looked for" in verdict.note
    assert "not looked for" not in judged("degenerate_chosen").note


def test_a_measure_of_a_sample_says_so() -> None:
    assert "1120 pairs" in judged("pair_distance").note
    assert "1120 of 5000 pairs" in judged("pair_distance", pairs=5000).note


def test_a_dataset_that_was_never_measured_is_to_be_made_again() -> None:
    report = dataset_report()
    del report["quality"]
    with pytest.raises(ConfigError, match="materialise it again"):
        quality_verdicts(report, DpoSection(), BANDS)


def test_what_people_prefer_in_published_sets_never_blocks_by_itself() -> None:
    # Longer answers, easy pairs, and answers cut at 1024 tokens stand in sets that good models were trained on.
    assert {name for name, info in CHECK_BY_NAME.items() if info.asset == "dpo_dataset" and not info.blocking} == {
        "length_bias",
        "too_easy",
        "answers_truncated",
        "feedback_drift",
    }


def shown(values: dict[str, Any], title: str) -> str:
    return str(values[title])


def test_a_dataset_shows_its_plots_and_is_judged_from_its_report_alone(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    recipe = trl_recipe(trl_feedback(tmp_path / "pairs.jsonl", pairs=120))
    result = materialize(recipe, instance, TO_DATASET)
    assert result.success
    # "The number 7 is a happy one." against "No.": longer, and told by form alone. Neither blocks.
    failed = failed_checks(result)
    assert set(failed) == {"enough_pairs", "length_bias", "too_easy"}
    assert shown(failed["length_bias"], "answer lengths").startswith("![")
    made = metadata(result, "dpo_dataset")
    assert "data:image/png;base64," in shown(made, "edit distance")
    assert len(shown(made, "edit distance")) + len(shown(made, "answer lengths")) < 64_000
    report = json.loads((Path(str(made["path"])) / "report.json").read_text(encoding="utf-8"))
    assert quality_views(report, BANDS)["length_bias"]["answer lengths"] == shown(made, "answer lengths")


def test_nearly_equal_answers_stop_a_run_before_training(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    feedback = tmp_path / "near.jsonl"
    sentence = "Once upon a time there was a little girl who liked to play in the park with her friend"
    rows = [
        f'{{"prompt": "Tell me story {n}.", "chosen": "{sentence} {n}.", "rejected": "{sentence} {n}!"}}\n'
        for n in range(120)
    ]
    feedback.write_text("".join(rows), encoding="utf-8")
    result = materialize(trl_recipe(feedback), instance, [*TO_DATASET, "dpo_plan"])
    assert not result.success
    assert "sft" in failed_checks(result)["pair_distance"]["what to change"]
    assert not [e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == "dpo_plan"]
    held = trl_recipe(feedback) | {"dpo": {"loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}}
    again = materialize(held, instance, [*TO_DATASET, "dpo_plan"])
    assert [e for e in again.get_asset_materialization_events() if e.asset_key.path[-1] == "dpo_plan"]
