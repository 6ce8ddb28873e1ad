"""`dpo_plan`: the resolved recipe of a run, and the gates that need no training to be closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import dagster as dg
from pydantic import Field, create_model

from dpo_assets.artifact import Artifact, read_kept, write_json
from dpo_assets.assets.base_model import known_licence, read_facts, refuse_adapter_alone, refuse_unlicensed
from dpo_assets.assets.dpo_dataset import dataset_stats
from dpo_assets.assets.gguf_model import rehearse
from dpo_assets.assets.harness_tasks import look_up_tasks
from dpo_assets.assets.lineage import Read
from dpo_assets.assets.node import Node
from dpo_assets.assets.publication import access_ahead
from dpo_assets.assets.refreshing import Refreshing
from dpo_assets.assets.room import refuse_without_room
from dpo_assets.assets.scorers_ahead import refuse_scorers
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.config import plan_verdicts
from dpo_assets.checks.coverage import coverage_table
from dpo_assets.checks.verdict import Verdict
from dpo_assets.planning.matrices import read_matrices
from dpo_assets.planning.model_folder import read_description
from dpo_assets.planning.offers import installed_here
from dpo_assets.planning.plan import ModelShape, TrainingPlan, make_plan, settings_digest
from dpo_assets.recipe import OVERRIDABLE, Recipe, apply_overrides
from dpo_assets.report.tables import table
from dpo_assets.section import Section

PLAN = "plan.json"
# Of the recipe's `refresh`, what decides a plan: not when it is made.
POLICY = ("refresh.policy", "refresh.replay_ratio", "refresh.most_continued", "refresh.renew_sft_after")


def materialise(step: Step) -> Events:
    """Lays the launchpad's overrides over the recipe and resolves it for model, data and device."""
    # Before anything is trained for it.
    if not (step.recipe.publishing.dry_run or step.only_checks):
        step.store.refuse_passing(step.context.instance)
    inputs = step.inputs()
    dataset, base = inputs["dpo_dataset"], inputs["base_model"]
    refuse_adapter_alone(step.recipe.publishing, base)
    refuse_unlicensed(step.recipe, base)
    rehearse(step, base)
    if not step.only_checks and (silent := refuse_scorers(step.recipe.evaluation, step.hub)):
        step.context.log.warning(f"dpo_plan: {silent}; it is asked again once there are answers to compare")
    look_up_tasks(step, base)
    access = access_ahead(step, known_licence(step.recipe, base))
    recipe = apply_overrides(step.recipe, {name: step.config.get(name, {}) for name in OVERRIDABLE})
    plan = make_plan(recipe, _shape(base), dataset_stats(dataset), step.gpu.detect(), installed_here())
    trains_from = sft_start = ""  # Of a plan that was made before, only the run that made it knew why.
    if not step.only_checks:
        sft, start = Refreshing(step, plan, inputs).chosen()
        plan, trains_from, sft_start = plan.refreshed(start.refresh), start.why, sft.why

    def make(folder: Path, _: str) -> None:
        write_json(folder / PLAN, plan.model_dump(mode="json"))
        # Part of the content: new pairs must give a new data version also where no number of the plan changes.
        write_json(folder / "inputs.json", inputs.digests)

    artifact, reused = step.build("dpo_plan", plan.model_dump(mode="json"), inputs, make)
    needed = 0 if step.only_checks else refuse_without_room(step, plan, {**inputs, "dpo_plan": artifact})
    plan = read_plan(artifact)  # Where checks are evaluated again, the plan is the one that was made then.
    step.context.log.info(f"precision: {plan.precision_reason}")
    for said in filter(None, (sft_start, trains_from)):
        step.context.log.info(said)
    yield from step.result(
        "dpo_plan",
        artifact,
        reused,
        [_with_reason(verdict, trains_from) for verdict in plan_verdicts(plan, step.bands)],
        {
            "precision": plan.precision,
            "precision_reason": plan.precision_reason,
            "device": plan.device_name,
            "kernels": plan.kernels,
            "engines": dg.MetadataValue.md(engines_table(plan)),
            "computed_in": plan.compute,
            "scored": plan.scored,
            "adapted_share": plan.coverage.share,
            "lora_coverage": dg.MetadataValue.md(coverage_table(plan.coverage)),
            "token_budget": plan.token_budget,
            "memory_gib": round(plan.memory_gib, 2),
            "disk_gib_to_write": round(needed / 2**30, 2),
            "trains_from": trains_from,
            "generation": plan.refresh.generation,
            "sft_start": sft_start,
            "dpo_pairs": plan.train_pairs,
            "sft_steps": plan.sft_steps,
            "dpo_steps": plan.dpo_steps,
            "learning_rate": plan.dpo.learning_rate,
            "beta": plan.dpo.beta,
            "loss": plan.dpo.loss,
            "reference": plan.dpo.reference,
            "hyperparameters": dg.MetadataValue.md(_hyperparameters(plan)),
            **access,
        },
    )


def _with_reason(verdict: Verdict, why: str) -> Verdict:
    """`refresh_policy` with the reason. It is none of the plan's: an equal run later has another, and the same plan."""
    return replace(verdict, note=why) if verdict.check == "refresh_policy" else verdict


def _shape(base: Artifact) -> ModelShape:
    """The base as planning sees it. Its facts may be of an earlier version; the worker describes it by this one."""
    facts, folder = read_facts(base), base.path / "model"
    described = facts.model_copy(update={"decoder": read_description(folder)})
    return described.with_matrices(read_matrices(folder, facts.layers))


def read_plan(artifact: Artifact) -> TrainingPlan:
    """The plan that a training stage follows.

    Raises:
        ConfigError: it is one of an earlier version.
    """
    return read_kept(artifact, PLAN, TrainingPlan)


def followed(settings: Callable[[TrainingPlan], dict[str, object]]) -> Read:
    """The plan, read for some of its settings: with the same ones, a plan that differs elsewhere changes nothing."""

    def part(plan: Artifact) -> str:
        return settings_digest(settings(read_plan(plan)))

    return Read("dpo_plan", part)


def engines_table(plan: TrainingPlan) -> str:
    """Every engine side by side: what was predicted of it, and why it was not taken."""
    rows = [
        [
            offer.name,
            "" if offer.pairs_per_s is None else f"{offer.pairs_per_s:.3g}",
            "" if offer.peak_gib is None else f"{offer.peak_gib:.1f}",
            "; ".join(filter(None, (offer.why_not or "taken", offer.note))),
        ]
        for offer in plan.engines
    ]
    return table(["engine", "pairs/s, predicted", "peak GiB, estimated", ""], rows)


def _hyperparameters(plan: TrainingPlan) -> str:
    sections = {"lora": plan.lora, "sft": plan.sft, "dpo": plan.dpo}
    rows = [[name, field, value] for name, section in sections.items() for field, value in section.model_dump().items()]
    return table(["section", "field", "value"], rows)


def override_config(recipe: Recipe) -> type[dg.Config]:
    """The launchpad form: every field of the overridable sections, filled with what the recipe declares."""
    sections = {name: _form(name, getattr(recipe, name)) for name in OVERRIDABLE}
    fields: dict[str, Any] = {
        name: (form, Field(default=form(), description=f"`{name}` of the recipe, for this run."))
        for name, form in sections.items()
    }
    return create_model("PlanOverrides", __base__=dg.Config, **fields)


def _form(name: str, section: Section) -> type[dg.Config]:
    """A section as launchpad fields. Literals become text there; the recipe's own validation decides what passes."""
    fields: dict[str, Any] = {}
    for field, info in type(section).model_fields.items():
        value = getattr(section, field)
        # A launchpad field has one type; text holds one name or several.
        if list[str] in get_args(info.annotation):
            value = value if isinstance(value, str) else ", ".join(value)
        items = float if info.annotation == list[float] else str
        kind = list[items] if isinstance(value, list) else type(value)  # type: ignore[valid-type]
        fields[field] = (kind, Field(default=value, description=info.description))
    return create_model(f"{name.capitalize()}Overrides", __base__=dg.Config, **fields)


NODE = Node(
    name="dpo_plan",
    description="Device, precision and why, token budget, steps, learning rate, beta, loss; gated before training.",
    phase="training",
    kinds=frozenset({"json"}),
    body=materialise,
    reads=(Read("dpo_dataset"), Read("base_model")),
    recipe=("lora", "sft", "dpo", "hardware", *POLICY),
    config=override_config,
)
