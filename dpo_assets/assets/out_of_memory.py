"""A worker stage that runs out of memory: smaller forwards in a fresh process, and what to change when none is left."""

from __future__ import annotations

import shutil
from typing import Any

import dagster as dg

from dpo_assets.artifact import VOLATILE, Artifact
from dpo_assets.contract import PlannedSpec, Spec, Stage
from dpo_assets.errors import OutOfMemory
from dpo_assets.planning.scoring import GENERATION_BATCH
from dpo_assets.resources.launcher import TrainingLauncher

MAX_HALVINGS = 3  # Of the token budget, after a stage ran out of memory.


def run_with_smaller_forwards(
    launcher: TrainingLauncher,
    context: dg.AssetExecutionContext,
    stage: Stage,
    spec: Spec,
    seconds: float,
    silent_seconds: float,
) -> None:
    """Runs a stage to its end, in processes of at most `seconds` each, of which none is silent for `silent_seconds`.

    Raises:
        OutOfMemory: when the smallest forwards still need too much, with what to change.
    """
    while True:
        try:
            launcher.run(context, stage, spec, seconds, silent_seconds)
            return
        except OutOfMemory as error:
            spec = _smaller(context, stage, spec, error)


def _smaller(context: dg.AssetExecutionContext, stage: Stage, spec: Spec, error: OutOfMemory) -> PlannedSpec:
    if not isinstance(spec, PlannedSpec):
        raise error
    smaller = spec.smaller_forwards()
    if smaller is None or smaller.out_of_memory_retries > MAX_HALVINGS:
        raise OutOfMemory(given_up(stage, spec, error)) from error
    context.log.warning(
        f"stage `{stage}` ran out of memory in forwards of {spec.plan.token_budget} tokens ({error}). A fresh "
        f"process follows with {smaller.plan.token_budget} (retry {smaller.out_of_memory_retries} of "
        f"{MAX_HALVINGS}); pairs per optimizer step stay the same."
    )
    shutil.rmtree(spec.output_dir)
    spec.output_dir.mkdir()
    return smaller


def given_up(stage: Stage, spec: PlannedSpec, error: OutOfMemory) -> str:
    """What was tried, and what to change."""
    answers = stage == "evaluate"
    plan, retries = spec.working_plan, spec.out_of_memory_retries
    tried = f" after {retries} {'retry' if retries == 1 else 'retries'} with smaller ones" if retries else ""
    least = "; the longest pair alone takes that many" if plan.token_budget <= plan.longest_pair else ""
    ways = [f"lower feedback.max_length{'' if answers else ' or lora.rank'}", "take a smaller base"]
    if answers:
        least += f", and answers take forwards of {GENERATION_BATCH} prompts that no retry makes smaller"
        ways.insert(0, f"set evaluation.generations below {GENERATION_BATCH}")
    if plan.device == "cuda" and spec.plan.precision != "4bit":
        ways.insert(0, "set hardware.precision to 4bit")
    return (
        f"stage `{stage}` ran out of memory in forwards of {plan.token_budget} tokens{tried}{least}: {error} "
        f"To go on: {', or '.join(ways)}. `dpo-assets plan` says what fits on which card."
    )


def memory_record(artifact: Artifact) -> dict[str, int]:
    """The forwards that a training stage ended up with, for its materialisation."""
    if not (artifact.path / VOLATILE).is_file():
        return {}
    said: dict[str, Any] = artifact.json(VOLATILE)
    return {name: int(said[name]) for name in ("token_budget_used", "out_of_memory_retries") if name in said}
