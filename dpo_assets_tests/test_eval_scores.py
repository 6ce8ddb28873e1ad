"""What `eval_scores` asks of the worker: the champion that the ledger names, and who else is scored.

Artefacts are made by hand on a shelf; the step that reads them is the pipeline's own, run by Dagster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.artifact import write_json
from dpo_assets.checks.evidence.ledger import Decided, Ledger, Primary
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.checks.neutral import NEUTRAL
from dpo_assets.contract import ChampionSpec, EvaluateSpec, Spec, Stage
from dpo_assets.errors import ConfigError
from dpo_assets.resources.launcher import TrainingLauncher
from dpo_assets_tests.pipelines import demo_recipe, failures
from dpo_assets_tests.samples import aftermath_report, dpo_report, evaluation_report
from dpo_assets_tests.test_lineage import Shelf, instance, shelf
from dpo_assets_tests.test_published_model import fill

__all__ = ["instance", "shelf"]  # Fixtures.
ASKED: list[EvaluateSpec] = []
AT = "2026-11-27T00:00:00+00:00"


class Asking(TrainingLauncher):
    """Keeps what the worker would be told, and ends there: what it does is tested without Dagster."""

    def run(
        self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float, silent_seconds: float
    ) -> None:
        assert isinstance(spec, EvaluateSpec)
        ASKED.append(spec)
        raise ConfigError("asked, and no further")


def asked(shelf: Shelf, **evaluation: Any) -> EvaluateSpec | str:
    """The spec of a materialisation of `eval_scores`, or why there is none."""
    ASKED.clear()
    defs = build_dpo_defs("demo", demo_recipe(evaluation=evaluation), resources={"launcher": Asking()})
    job = dg.define_asset_job("scores", selection=dg.AssetSelection.assets(["demo", "eval_scores"]))
    resolved = dg.Definitions.merge(defs, dg.Definitions(jobs=[job])).resolve_job_def("scores")
    result = resolved.execute_in_process(instance=shelf.instance, raise_on_error=False)
    [said] = failures(result)
    return ASKED[0] if ASKED else said


def go_live(shelf: Shelf, **inputs: str) -> str:
    """The model on the shelf is decided on, by these inputs, and released."""
    name = shelf.now["merged_model"].digest
    found = Primary(difference=0.2, low=0.1, high=0.3, p_better=0.001, adjusted=0.001, pairs=99, prompts=99)

    def released(ledger: Ledger) -> Ledger:
        decided = Decided(
            number=len(ledger.lines) + 1, before=ledger.head, at=AT, champion=ledger.champion, challenger=name,
            inputs=inputs, primaries={"reward": found}, level=0.0125, saw=("p",), decision="first_publication",
            found=True, reason="better",
        )  # fmt: skip
        return ledger.append(decided).released(
            decided, at=AT, repo_id="org/bot", commit="c" * 40, tag="t", artefact="f", known=["p"]
        )

    LedgerFile.of(shelf.tree.root).extend(released)
    return name


def test_without_a_release_nobody_but_the_policy_and_its_start_is_scored(shelf: Shelf) -> None:
    fill(shelf, evaluation_report())
    spec = asked(shelf)
    assert isinstance(spec, EvaluateSpec)
    assert spec.champion is None
    assert spec.score_cache == shelf.tree.root / "cache" / "reference.sqlite"


@pytest.mark.parametrize(
    ("again", "same_start"),
    [(["dpo_adapter", "merged_model"], True), (["sft_checkpoint", "dpo_adapter", "merged_model"], False)],
    ids=["same start", "another start"],
)
def test_the_champion_of_the_ledger_is_scored_beside_the_policy(
    shelf: Shelf, again: list[str], same_start: bool
) -> None:
    fill(shelf, evaluation_report())
    was, name = dict(shelf.now), go_live(shelf)
    before = asked(shelf)
    for node in again:
        shelf.make(node, "refreshed")
    spec = asked(shelf)
    assert isinstance(before, EvaluateSpec)
    assert before.champion is None, "the champion itself is held against what it was held against"
    assert isinstance(spec, EvaluateSpec)
    kinds = ("base_model", "sft_checkpoint", "dpo_adapter", "merged_model")
    assert spec.champion == ChampionSpec(
        name=name,
        base_model=spec.base_model,
        template=spec.template,
        sft_adapter=None,
        adapter=was["dpo_adapter"].path / "adapter",
        policy=was["merged_model"].path / "model",
        inputs={kind: was[kind].digest for kind in kinds},
        same_start=same_start,
    )
    assert spec.policy == shelf.now["merged_model"].path / "model"


def test_scores_against_another_champion_are_other_scores(shelf: Shelf) -> None:
    fill(shelf, evaluation_report())
    shelf.make("dpo_adapter", "refreshed")
    shelf.make("merged_model", "refreshed")
    alone = asked(shelf)
    refreshed = [shelf.now["dpo_adapter"], shelf.now["merged_model"]]
    shelf.make("dpo_adapter", "first")
    shelf.make("merged_model", "first")
    go_live(shelf)
    for node in ("dpo_adapter", "merged_model"):
        shelf.make(node, "refreshed")
    assert [shelf.now["dpo_adapter"], shelf.now["merged_model"]] == refreshed
    against = asked(shelf)
    assert isinstance(alone, EvaluateSpec)
    assert isinstance(against, EvaluateSpec)
    assert against.champion is not None
    assert alone.fingerprint != against.fingerprint


def test_a_champion_whose_artefacts_are_gone_is_named_with_the_way_out(shelf: Shelf) -> None:
    fill(shelf, evaluation_report())
    go_live(shelf)
    gone: Any = shelf.now["dpo_adapter"].path
    for node in ("dpo_adapter", "merged_model"):
        shelf.make(node, "refreshed")
    gone.rename(gone.parent.parent / "elsewhere")
    said = asked(shelf)
    assert isinstance(said, str)
    assert "the champion's `dpo_adapter`" in said
    assert "rollback" in said


@pytest.mark.parametrize(
    ("answers", "precision", "sampled"),
    [
        ({"kl": {"per_token": 0.1, "low": 0.0}}, "bf16", 0),
        ({"kl": {"per_token": 0.1, "low": 0.0}}, "4bit", 32),
        ({"kl": {"not_measured": "no packed scorer"}}, "bf16", 32),
    ],
    ids=["measured", "of another model", "not measured"],
)
def test_what_training_measured_of_the_same_weights_is_not_measured_twice(
    shelf: Shelf, answers: dict[str, Any], precision: str, sampled: int
) -> None:
    said = aftermath_report()["answers"] | answers
    fill(shelf, evaluation_report(), precision=precision)
    report = dpo_report(**aftermath_report() | {"answers": said}).model_dump(mode="json")
    shelf.make("dpo_adapter", "measured", also=lambda folder: write_json(folder / "report.json", report))
    shelf.make("merged_model", "measured")
    spec = asked(shelf)
    assert isinstance(spec, EvaluateSpec)
    assert spec.sampled_answers == sampled


def test_a_corpus_is_known_by_its_content_and_a_damaged_one_ends_before_anything_is_scored(
    shelf: Shelf, tmp_path: Path
) -> None:
    fill(shelf, evaluation_report())
    own, same, damaged = (tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl"))
    own.write_text("A line.\n\nAnother.", encoding="utf-8")
    same.write_bytes(own.read_bytes())
    damaged.write_text('{"txt": "A line."}', encoding="utf-8")
    built_in, one, other, refused = (
        asked(shelf, **changes)
        for changes in ({}, {"corpus": str(own)}, {"corpus": str(same)}, {"corpus": str(damaged)})
    )
    assert isinstance(built_in, EvaluateSpec)
    assert isinstance(one, EvaluateSpec)
    assert isinstance(other, EvaluateSpec)
    assert (built_in.corpus, one.corpus) == (NEUTRAL, own)
    assert built_in.fingerprint != one.fingerprint == other.fingerprint
    assert isinstance(refused, str)
    assert "c.jsonl, line 1" in refused
