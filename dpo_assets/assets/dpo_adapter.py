"""`dpo_adapter`: the LoRA adapter that DPO trained, its metric log and its plots."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import dagster as dg

from dpo_assets import score_file
from dpo_assets.artifact import VOLATILE, Artifact
from dpo_assets.assets.base_model import in_worker
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.lineage import Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.out_of_memory import memory_record
from dpo_assets.assets.refreshing import ADAPTER, gone_on_from, start_adapter, training_set
from dpo_assets.assets.resuming import resume_record
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.aftermath import aftermath_verdicts, collapse_verdict
from dpo_assets.checks.bands import Bands
from dpo_assets.checks.collapse import ACCURACY, ENTROPY, Trigger, first_trigger
from dpo_assets.checks.reports import Aftermath, DpoReport, SampledAnswers, Stop, read_metrics
from dpo_assets.checks.tasks import read_tasks
from dpo_assets.checks.training import dpo_verdicts
from dpo_assets.checks.verdict import Verdict
from dpo_assets.contract import GuardSpec, TrainSpec
from dpo_assets.planning.companions import is_tokenizer_file
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.report.plots import line_plot
from dpo_assets.report.tables import table

RELATIVE = (ACCURACY, ENTROPY)  # Judged against the first logs, so that a limit in their own unit would mislead.
# Of the report, what the asset's metadata leaves to the checks.
PARTS = {"lora_coverage", "lora_planned", "stopped", "trigger", *Aftermath.model_fields}


def materialise(step: Step) -> Events:
    """Runs the DPO stage; its reference scores come from the cache where they are known."""
    inputs = step.inputs()
    plan = read_plan(inputs["dpo_plan"])
    base = inputs["base_model"]
    release = None if step.only_checks else gone_on_from(step.tree, plan.refresh)
    if release is not None:
        inputs = inputs.using("dpo_adapter", release)
    guard = GuardSpec.of(plan, step.bands, step.recipe.checks)
    if guard.tasks is not None and not step.only_checks:
        read_tasks(guard.tasks)  # A damaged probe must end here, not after the training.

    def make(folder: Path, print_: str) -> None:
        pairs = training_set(step, plan, inputs) if release is not None else None
        step.launch(
            "dpo",
            TrainSpec(
                kind="dpo_adapter",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                **in_worker(base),
                threads=step.recipe.hardware.threads,
                dataset=inputs["dpo_dataset"].path,
                plan=plan,
                checkpoints=step.checkpoints("dpo_adapter", print_),
                start_adapter=start_adapter(inputs["sft_checkpoint"]),
                reference_cache=step.tree.root / score_file.FILE,
                base_digest=base.digest,
                tokenizer_digest=tokenizer_digest(base),
                guard=guard,
                goes_on_from=release.path / ADAPTER if release is not None else None,
                training_set=pairs.path if pairs is not None else None,
            ),
        )

    config: dict[str, object] = {"guard": guard.identity()}
    if _would_go_on(step.found("dpo_adapter", config, inputs), guard):
        config |= {"limits": guard.limits.model_dump(), "stops": guard.stops}
    artifact, reused = step.build("dpo_adapter", config, inputs, make)
    report, metrics = DpoReport.of(artifact), artifact.path / "metrics.jsonl"
    margins = {"rewards/margins": "margin", "rewards/chosen": "chosen", "rewards/rejected": "rejected"}
    verdicts = [*dpo_verdicts(report, step.bands), collapse(report, metrics, guard, step.bands)]
    verdicts += [_with_answers(v, report) for v in aftermath_verdicts(report, step.bands)]
    yield from step.result(
        "dpo_adapter",
        artifact,
        reused,
        verdicts,
        {
            **report.model_dump(mode="json", exclude=PARTS),
            "refresh_policy": plan.refresh.policy,
            "generation": plan.refresh.generation,
            "trained_on_pairs": plan.train_pairs,
            **memory_record(artifact),
            **resume_record(artifact),
            "reference_pairs_from_cache": artifact.json(VOLATILE)["reference_pairs_from_cache"],
            "loss": dg.MetadataValue.md(
                line_plot(metrics, {"loss": "loss"}, "DPO loss", level=report.expected_first_loss)
            ),
            "margins": dg.MetadataValue.md(
                line_plot(metrics, margins, "implicit rewards (beta x log-ratio)", level=0.0)
            ),
        },
    )


def _would_go_on(stopped: Artifact | None, guard: GuardSpec) -> bool:
    """Whether an earlier run was stopped that under the limits of now would train on."""
    if stopped is None or not DpoReport.of(stopped).stopped:
        return False
    return not guard.stops or first_trigger(read_metrics(stopped.path / "metrics.jsonl"), guard.limits) is None


def collapse(report: DpoReport, metrics: Path, guard: GuardSpec, bands: Bands) -> Verdict:
    """The check `collapse`, with the curve of the metric that fired, its limit and the stop."""
    rows = read_metrics(metrics)
    verdict = collapse_verdict(report, rows, guard.limits, bands)
    fired = report.stopped or first_trigger(rows, guard.limits)
    if verdict.passed or not fired:
        return verdict
    title = f"{fired.metric}: limit and stop" if report.stopped else f"{fired.metric}: limit, and where it fired"
    return replace(verdict, shown={"curve": collapse_plot(metrics, fired, title)})


def collapse_plot(metrics: Path, fired: Stop | Trigger, title: str) -> str:
    """The curve of the metric that fired. Falls and ratios are drawn as they are logged, without the limit."""
    level = fired.limit if fired.metric not in RELATIVE else None
    return line_plot(metrics, {fired.metric: fired.metric}, title, level=level, mark=fired.step)


def _with_answers(verdict: Verdict, report: DpoReport) -> Verdict:
    """`generation_health` with some answers side by side: a share says little about what went wrong."""
    answers = report.answers
    if verdict.check != "generation_health" or not isinstance(answers, SampledAnswers) or not answers.examples:
        return verdict
    rows = [list(example) for example in answers.examples]
    return replace(verdict, shown={"answers": table(["prompt (its end)", "reference", "policy"], rows)})


def tokenizer_digest(base: Artifact) -> str:
    """Digest of the files that decide how text becomes tokens."""
    files = {path.removeprefix("model/"): entry for path, entry in base.manifest.files.items()}
    parts = [f"{name}:{files[name].sha256}" for name in sorted(files) if is_tokenizer_file(name)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


NODE = Node(
    name="dpo_adapter",
    description="The DPO adapter with its metric log: packed trainer, cached reference, first loss proven to be ln 2.",
    phase="training",
    kinds=frozenset({"pytorch", "huggingface"}),
    body=materialise,
    reads=(followed(TrainingPlan.dpo_part), Read("sft_checkpoint"), Read("dpo_dataset"), Read("base_model")),
    recipe=("lora", "dpo", "checks"),
    trains=True,
)
