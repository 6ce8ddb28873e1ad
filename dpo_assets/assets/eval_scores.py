"""`eval_scores`: held-out scores of SFT, policy and champion with intervals, and answers side by side."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import dagster as dg

from dpo_assets import score_file
from dpo_assets.artifact import VOLATILE, Artifact
from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.champion import Champion, champion_of, find_champion
from dpo_assets.assets.compared_release import release_spec
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.kept_models import trained_record
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.refreshing import start_adapter
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.evaluation import champion_scored, divergence_in_training, released_kl
from dpo_assets.checks.evidence.candidate import ScoredPairs
from dpo_assets.checks.evidence.clusters import COUNTED_BY
from dpo_assets.checks.instructions import digest, instructions_followed
from dpo_assets.checks.neutral import NEUTRAL, neutral_perplexity, read_texts
from dpo_assets.checks.promotion import Learned, Margins, evaluation_verdicts
from dpo_assets.checks.reports import Divergence, DpoReport, EvaluationReport, HeldOutPairs
from dpo_assets.contract import ChampionSpec, EvaluateSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.trained import seen_pairs
from dpo_assets.hashing import file_sha256
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.precision import QUANTISED
from dpo_assets.report.score_plots import score_plots
from dpo_assets.report.scores import (
    answers_table,
    distance_table,
    instructions_table,
    parts_table,
    perplexity_table,
    scores_table,
)

SCORES = "scores.parquet"


def materialise(step: Step) -> Events:
    """Scores the held-out split. What that decides, `promotion` says."""
    inputs, evaluation = step.inputs(), step.recipe.evaluation
    plan = read_plan(inputs["dpo_plan"])
    # What was made is judged by what it was held against then.
    champion = None if step.only_checks else champion_of(step, inputs["merged_model"].digest)

    corpus = Path(evaluation.corpus) if evaluation.corpus else NEUTRAL
    if not step.only_checks:
        read_texts(corpus)  # A damaged one must end here, before anything is scored.
    adapter, merged = _dpo_report(inputs["dpo_adapter"]), plan.scoring.subject == "merged"
    # On a quantised base training measured another model than is released.
    kl = None if merged and plan.precision in QUANTISED else divergence_in_training(adapter)
    sampled = 0 if kl else evaluation.sampled_answers
    settings = evaluation.model_dump(include={"confidence", "generations", "max_new_tokens"})
    settings["instructions"] = digest(evaluation.instructions)
    config: dict[str, object] = {"evaluation": settings, "sampled_answers": sampled, "counted_by": COUNTED_BY}
    config["corpus"] = file_sha256(corpus) if corpus.is_file() else ""
    if champion is not None:
        config["champion"] = _digests(champion)

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "evaluate",
            EvaluateSpec(
                kind="eval_scores",
                **release_spec(step, inputs, plan, folder, print_),
                dataset=inputs["dpo_dataset"].path,
                parts=step.tree.checkpoints("eval_scores", print_),
                champion=_to_score_again(champion, inputs) if champion else None,
                corpus=corpus,
                sampled_answers=sampled,
                score_cache=step.tree.root / score_file.FILE,
                **evaluation.model_dump(
                    include={"confidence", "generations", "max_new_tokens", "min_pairs", "instructions"}
                ),
            ),
        )

    artifact, reused = step.build("eval_scores", config, inputs, make)
    report = EvaluationReport.of(artifact)
    yield from step.result(
        "eval_scores",
        artifact,
        reused,
        [
            *evaluation_verdicts(
                report,
                step.bands,
                seen=_seen(step, inputs, artifact, report),
                learned=_learned(adapter, artifact),
                merged=merged,
            ),
            released_kl(report, kl, step.bands),
            neutral_perplexity(report, step.bands),
            champion_scored(report),
            instructions_followed(report),
        ],
        {
            "scored": report.scored or "not recorded: these scores are of an earlier version",
            "scored_because": plan.scoring.reason,
            "kernels": report.kernels or "not recorded: these scores are of an earlier version",
            "kernels_note": report.kernels_note,
            "champion": report.champion or "none yet: it is held against its own start",
            "held_out_pairs": report.pairs,
            "held_out_prompts": report.prompts,
            **({} if step.only_checks else _from_cache(artifact)),
            "accuracy": report.implicit_reward_accuracy.value,
            "chosen_shift_nats_per_token": report.chosen_shift_nats_per_token,
            "rejected_shift_nats_per_token": report.rejected_shift_nats_per_token,
            "scores": dg.MetadataValue.md(scores_table(report)),
            **{title: dg.MetadataValue.md(plot) for title, plot in _plots(step, artifact).items()},
            "perplexity": dg.MetadataValue.md(perplexity_table(report)),
            "distance": dg.MetadataValue.md(distance_table(report, kl, _kl_of_champion(step, report) if kl else None)),
            "instructions": dg.MetadataValue.md(instructions_table(report)),
            "parts": dg.MetadataValue.md(parts_table(report)),
            "answers": dg.MetadataValue.md(answers_table(artifact.json("generations.json"))),
        },
    )


def _plots(step: Step, scores: Artifact) -> dict[str, str]:
    """Of the pairs one by one; none where only checks are evaluated, whose page has no plots."""
    return {} if step.only_checks else score_plots(ScoredPairs.read(scores.path / SCORES))


def _kl_of_champion(step: Step, report: EvaluationReport) -> Divergence | None:
    """As its training measured it, where the policy's was measured so too; None where it is not there to be asked."""
    if report.champion is None:
        return None
    with suppress(ConfigError):
        return divergence_in_training(_dpo_report(find_champion(step.tree, report.champion).adapter))
    return None


def _from_cache(scores: Artifact) -> dict[str, int]:
    """Of each model, the pairs whose scores an earlier run had taken."""
    told = scores.json(VOLATILE) if VOLATILE in scores.manifest.files else {}
    return {name: count for name, count in told.items() if name.endswith("_pairs_from_cache")}


def _dpo_report(adapter: Artifact) -> DpoReport | None:
    """What was measured of the adapter. None where its report is of an earlier version: no other check waits for it."""
    with suppress(ConfigError):
        return DpoReport.of(adapter)
    return None


def _learned(adapter: DpoReport | None, scores: Artifact) -> Learned:
    """What was measured of the adapter, beside its pairs' margins after the merge; None: of an earlier version."""
    measured = adapter.held_out if adapter else None
    if isinstance(measured, HeldOutPairs):
        return Margins(measured, _margins(scores)) if measured.margins else None
    return measured


def _margins(scores: Artifact) -> dict[str, float]:
    """By `pair_id`, how much more the policy prefers the chosen answer than SFT does, in nats."""
    import polars as pl

    chosen, rejected = (pl.col(f"policy_{answer}") - pl.col(f"sft_{answer}") for answer in ("chosen", "rejected"))
    table_ = pl.read_parquet(scores.path / SCORES).select("pair_id", margin=chosen - rejected)
    return dict(table_.iter_rows())


def _seen(step: Step, inputs: Inputs, scores: Artifact, report: EvaluationReport) -> int:
    """Scored pairs that a scored model was trained on, whatever dataset was read to score them."""
    models = [inputs["dpo_adapter"], inputs["sft_checkpoint"]]
    if report.champion is not None:
        with suppress(ConfigError):  # Gone since: what it was trained on was looked at when it was scored.
            champion = find_champion(step.tree, report.champion)
            models += [champion.adapter, champion.start]
    sets = dict(found for model in models if (found := trained_record(step.tree, model)))
    return seen_pairs(scores.path / SCORES, inputs["dpo_dataset"].path, sets.values())


def _digests(champion: Champion) -> dict[str, str]:
    """By kind, of what the champion is made of."""
    return {
        "base_model": champion.base.digest,
        "sft_checkpoint": champion.start.digest,
        "dpo_adapter": champion.adapter.digest,
        "merged_model": champion.merged.digest,
    }


def _to_score_again(champion: Champion, inputs: Inputs) -> ChampionSpec:
    """The champion for the worker. A base of equal content is the challenger's own, so pairs are read once."""
    digests = _digests(champion)
    same = {kind: inputs[kind].digest == digests[kind] for kind in ("base_model", "sft_checkpoint")}
    return ChampionSpec(
        name=champion.name,
        **in_worker(inputs["base_model"] if same["base_model"] else champion.base),
        sft_adapter=start_adapter(champion.start),
        adapter=champion.adapter.path / "adapter",
        policy=champion.merged.path / "model",
        inputs=digests,
        same_start=all(same.values()),
    )


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
    description="Held-out accuracy of SFT, policy and champion with intervals and a length baseline, and answers.",
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
