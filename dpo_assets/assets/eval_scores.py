"""`eval_scores`: held-out scores of SFT and policy with intervals, answers side by side, and the promotion verdict."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import dagster as dg

from dpo_assets.artifact import Artifact
from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.kept_models import training_set
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.sft_checkpoint import start_adapter
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.evidence.power import EFFECT, POWER, one_sided, reach_of_comparison, reach_of_score
from dpo_assets.checks.promotion import Learned, Margins, decide, evaluation_verdicts, power_told
from dpo_assets.checks.reports import DpoReport, EvaluationReport, HeldOutPairs
from dpo_assets.checks.statistics import percent
from dpo_assets.contract import EvaluateSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.trained import seen_pairs
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.report.tables import table

SCORES = "scores.parquet"


def materialise(step: Step) -> Events:
    """Scores the held-out split; the verdict is part of what is written down."""
    inputs, evaluation = step.inputs(), step.recipe.evaluation
    plan = read_plan(inputs["dpo_plan"])

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "evaluate",
            EvaluateSpec(
                kind="eval_scores",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                **in_worker(inputs["base_model"]),
                threads=step.recipe.hardware.threads,
                dataset=inputs["dpo_dataset"].path,
                plan=plan,
                sft_adapter=start_adapter(inputs["sft_checkpoint"]),
                adapter=inputs["dpo_adapter"].path / "adapter",
                policy=inputs["merged_model"].path / "model",
                **evaluation.model_dump(include={"confidence", "generations", "max_new_tokens", "min_pairs"}),
            ),
        )

    config = {"evaluation": evaluation.model_dump(include={"confidence", "generations", "max_new_tokens"})}
    artifact, reused = step.build("eval_scores", config, inputs, make)
    report = EvaluationReport.of(artifact)
    decision, reason = decide(report, evaluation.min_pairs)
    answers = [[a["prompt"][-1]["content"], a["sft"], a["policy"]] for a in artifact.json("generations.json")]
    yield from step.result(
        "eval_scores",
        artifact,
        reused,
        evaluation_verdicts(
            report,
            step.recipe,
            step.bands,
            seen=_seen(step, inputs, artifact),
            learned=_learned(inputs["dpo_adapter"], artifact),
            merged=plan.scoring.subject == "merged",
        ),
        {
            "verdict": decision,
            "verdict_reason": reason,
            "scored": report.scored or "not recorded: these scores are of an earlier version",
            "scored_because": plan.scoring.reason,
            "kernels": report.kernels or "not recorded: these scores are of an earlier version",
            "kernels_note": report.kernels_note,
            "held_out_pairs": report.pairs,
            "held_out_prompts": report.prompts,
            "power": power_told(report),
            "accuracy": report.implicit_reward_accuracy.value,
            "chosen_shift_nats_per_token": report.chosen_shift_nats_per_token,
            "rejected_shift_nats_per_token": report.rejected_shift_nats_per_token,
            "scores": dg.MetadataValue.md(scores_table(report)),
            "parts": dg.MetadataValue.md(parts_table(report)),
            "answers": dg.MetadataValue.md(table(["prompt (last message)", "SFT", "policy"], answers)),
        },
    )


def scores_table(report: EvaluationReport) -> str:
    """Every score with its interval over prompts, and the least difference that so many pairs would find."""
    level = one_sided(report.confidence)
    rows = [
        [
            label,
            f"{score.value:.3f}",
            f"[{score.low:.3f}, {score.high:.3f}]",
            score.counted,
            f"{found.detectable:.3f}",
            f"{found.power:.0%}",
        ]
        for label, score in report.shares
        for found in [reach_of_score(score, level)]
    ]
    if (paired := report.logp_against_sft) is not None:
        found = reach_of_comparison(paired, level)
        rows.append(
            [
                "policy less SFT, log-probability per token, paired",
                f"{paired.difference:+.3f}",
                f"[{paired.low:+.3f}, {paired.high:+.3f}]",
                f"{paired.n} in {paired.clusters} prompts",
                f"{found.detectable:.3f}",
                f"{found.power:.0%}",
            ]
        )
    interval, least = f"{percent(report.confidence)} interval", f"found: {POWER:.0%} of the time"
    return table(["held-out accuracy", "value", interval, "pairs", least, f"{100 * EFFECT:.0f} points found"], rows)


def parts_table(report: EvaluationReport) -> str:
    """The policy by source and by quartile of the feedback's margin."""
    rows = [
        [
            f"{one.by}: {one.name}",
            one.reward.counted,
            f"{one.reward.value:.3f} [{one.reward.low:.3f}, {one.reward.high:.3f}]",
            f"{one.against_sft.difference:+.3f} [{one.against_sft.low:+.3f}, {one.against_sft.high:+.3f}]",
        ]
        for one in report.slices
    ]
    header = ["part", "pairs", "implicit reward", "log-probability per token, policy less SFT"]
    return table(header, rows) if rows else "one source, and one margin or none"


def _learned(adapter: Artifact, scores: Artifact) -> Learned:
    """What was measured of the adapter, beside its pairs' margins after the merge.

    None where its report is of an earlier version: no other check waits for it.
    """
    with suppress(ConfigError):
        measured = DpoReport.of(adapter).held_out
        if isinstance(measured, HeldOutPairs):
            return Margins(measured, _margins(scores)) if measured.margins else None
        return measured
    return None


def _margins(scores: Artifact) -> dict[str, float]:
    """By `pair_id`, how much more the policy prefers the chosen answer than SFT does, in nats."""
    import polars as pl

    chosen, rejected = (pl.col(f"policy_{answer}") - pl.col(f"sft_{answer}") for answer in ("chosen", "rejected"))
    table_ = pl.read_parquet(scores.path / SCORES).select("pair_id", margin=chosen - rejected)
    return dict(table_.iter_rows())


def _seen(step: Step, inputs: Inputs, scores: Artifact) -> int:
    """Scored pairs that the model was trained on, whatever dataset was read to score them."""
    models = (inputs["dpo_adapter"], inputs["sft_checkpoint"])
    sets = dict(found for model in models if (found := training_set(step.tree, model)))
    return seen_pairs(scores.path / SCORES, inputs["dpo_dataset"].path / "eval.parquet", sets.values())


def scoring_settings(plan: TrainingPlan) -> dict[str, object]:
    """What scores depend on, beside the models: which of them is scored, and at which precision."""
    return {
        "device": plan.device,
        "precision": plan.at_release().precision,
        "compute": plan.at_release().compute,
        "scored": plan.scoring.subject,
    }


NODE = Node(
    name="eval_scores",
    description="Held-out accuracy of SFT and policy with intervals and a length baseline, answers, promotion verdict.",
    phase="release",
    kinds=frozenset({"pytorch"}),
    body=materialise,
    reads=(
        followed(scoring_settings),
        Read("merged_model"),
        Read("dpo_adapter"),
        Read("sft_checkpoint"),
        Read("dpo_dataset"),
        Read("base_model"),
    ),
    recipe=("evaluation",),
    trains=True,
)
