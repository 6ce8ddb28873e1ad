"""The model card, written whole: library-made cards claim licences and base models that are not so."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from dpo_assets.checks.reports import EvaluationReport
from dpo_assets.checks.statistics import Proportion, percent
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.untrusted import in_code, in_markdown


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says. All of it comes from artefacts, none from templates."""

    title: str
    base_source: str
    base_revision: str | None
    licence: str
    artifact: str
    plan: TrainingPlan
    dataset: dict[str, Any]
    dataset_digest: str
    scores: EvaluationReport
    decision: str
    reason: str
    versions: dict[str, str]
    template_arguments: dict[str, Any] = field(default_factory=dict)


def card_settings(plan: TrainingPlan) -> dict[str, object]:
    """What a card says of a plan: with the same of it, a plan for another device or with other memory is no other
    release."""
    told = {"precision", "max_length", "dpo_steps", "sft", "dpo", "lora"}
    return {**plan.model_dump(mode="json", include=told), "compute": plan.compute}


def render_card(facts: CardFacts) -> str:
    """README.md of a release: front matter that the Hub reads, and a body for people."""
    plan, data, scores = facts.plan, facts.dataset, facts.scores
    front: dict[str, Any] = {
        "license": facts.licence,
        "library_name": "transformers" if facts.artifact == "merged" else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "dagster", "preference-optimization"],
    }
    if "/" in facts.base_source and not facts.base_source.startswith((".", "/")):
        front["base_model"] = facts.base_source
        front["base_model_relation"] = "finetune" if facts.artifact == "merged" else "adapter"
    reasons = ", ".join(f"{in_markdown(reason)}: {count}" for reason, count in data["reasons"].items()) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    return f"""---
{yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip()}
---

# {in_markdown(facts.title)}

A language model aligned to human preferences by direct preference optimisation (DPO, arXiv 2305.18290), released as
{"one merged model" if facts.artifact == "merged" else "a LoRA adapter"}. Base: {_base(facts)}.

## Training data
{data["rows_in"]} feedback rows: {data["accepted"]} accepted ({data["train_pairs"]} train,
{data["eval_pairs"]} held out), {data["quarantined"]} quarantined ({reasons}), {data["duplicates"]} duplicates.
Dataset digest `{facts.dataset_digest}`.

## Procedure
SFT: {plan.sft.strategy}. DPO: loss {" + ".join(plan.dpo.losses)}, beta {plan.dpo.beta:g}, learning rate
{plan.dpo.learning_rate:g} ({plan.dpo.schedule}, warm-up {plan.dpo.warmup_ratio:g}), {plan.dpo_steps} steps of
{plan.dpo.batch_size} pairs, {plan.dpo.epochs:g} epochs, LoRA rank {plan.lora.rank} alpha {plan.lora.alpha},
max length {plan.max_length} tokens, seed {plan.dpo.seed}.
Precision: base weights in {plan.precision}, computed in {plan.compute}. Versions: {versions}.{_template(facts)}

## Evaluation on held-out pairs
| score | value | {percent(scores.confidence)} interval | pairs |
|---|---|---|---|
{_score("policy, implicit reward against SFT", scores.implicit_reward_accuracy)}
{_score("policy, log-probability per token", scores.logp_accuracy_policy)}
{_score("SFT, log-probability per token", scores.logp_accuracy_sft)}
{_score("baseline: pick the longer answer", scores.pick_the_longer)}

Verdict: **{facts.decision}** ({in_markdown(facts.reason)}).

## Limitations
Held-out accuracy says how the policy ranks pairs of this feedback, not how safe or true its answers are. Compare it
with the length baseline: a policy can score well by liking long answers. Licence of the base:
{in_markdown(facts.licence)}.
"""


def _base(facts: CardFacts) -> str:
    revision = f" at revision `{facts.base_revision}`" if facts.base_revision else ""
    return f"{in_code(facts.base_source)}{revision} ({in_markdown(facts.licence)})"


def _template(facts: CardFacts) -> str:
    """What whoever asks the model must give its chat template, to ask as it was trained."""
    if not facts.template_arguments:
        return ""
    return f"\nChat template arguments: {in_code(json.dumps(facts.template_arguments, sort_keys=True))}."


def _score(label: str, score: Proportion) -> str:
    return f"| {label} | {score.value:.3f} | [{score.low:.3f}, {score.high:.3f}] | {score.n} |"
