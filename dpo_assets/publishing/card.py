"""The model card, written whole: library-made cards claim licences and base models that are not so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from dpo_assets.checks.reports import DpoReport, EvaluationReport, MergeReport
from dpo_assets.checks.statistics import Proportion, percent
from dpo_assets.checks.verdict import Level
from dpo_assets.planning.licence import Licence
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.publishing.loading import load_snippet, serve_line
from dpo_assets.publishing.trace import Withdrawn
from dpo_assets.untrusted import in_code, in_markdown

OUTCOMES: dict[Level, str] = {"pass": "passed", "warn": "warned", "error": "failed"}


@dataclass(frozen=True)
class Standing:
    """Where a release stands among those of its pipeline.

    Attributes:
        preview: nothing was decided yet: of a dry run.
        replaces: the release that was live until then, in a few words; empty: none was.
        level: one-sided, of the test that decided; None: nothing was looked at.
        spent: error over all decisions up to this one, of `alpha`.
        override: why a person decided; empty: the rules did.
        withdrawn: what became of the rows of the release that it replaces; None: that cannot be told.
    """

    pipeline: str
    number: int
    preview: bool
    replaces: str
    level: float | None
    spent: float
    alpha: float
    override: str
    withdrawn: Withdrawn | None


@dataclass(frozen=True)
class CardFacts:
    """Everything a card says. All of it comes from artefacts, none from templates.

    Attributes:
        repo_id: where the release goes; None where it is only staged.
        hub: address of the Hub that it goes to, and that the base is from.
        licence: of the base; None where none is known, which no release that is sent has.
        licence_files: of the release, by name.
        beyond_text: whether the base holds more than a language model.
        checks: by asset, the levels of its checks.
    """

    title: str
    repo_id: str | None
    hub: str
    base_source: str
    base_revision: str | None
    licence: Licence | None
    licence_files: tuple[str, ...]
    artifact: str
    plan: TrainingPlan
    dataset: dict[str, Any]
    dataset_digest: str
    training: DpoReport
    merge: MergeReport
    scores: EvaluationReport
    decision: str
    reason: str
    checks: Mapping[str, Mapping[str, Level]]
    versions: dict[str, str]
    standing: Standing
    beyond_text: bool = False
    template_arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def base_on_hub(self) -> bool:
        return "/" in self.base_source and not self.base_source.startswith((".", "/"))


def card_settings(plan: TrainingPlan) -> dict[str, object]:
    """What a card says of a plan: with the same of it, a plan for another device or with other memory is no other
    release."""
    told = {"precision", "max_length", "dpo_steps", "sft", "dpo", "lora", "refresh"}
    return {**plan.model_dump(mode="json", include=told), "compute": plan.compute}


def render_card(facts: CardFacts) -> str:
    """README.md of a release: front matter that the Hub reads, and a body for people."""
    plan, data = facts.plan, facts.dataset
    reasons = ", ".join(f"{in_markdown(reason)}: {count}" for reason, count in data["reasons"].items()) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    outside = f", {count} outside of the days trained on" if (count := data.get("outside_window", 0)) else ""
    return f"""---
{front_matter(facts)}
---

# {in_markdown(facts.title)}

A language model aligned to human preferences by direct preference optimisation (DPO, arXiv 2305.18290), released as
{"one merged model" if facts.artifact == "merged" else "a LoRA adapter"}. Base: {_base(facts)}.

## Use
{_use(facts)}

## Training data
{data["rows_in"]} feedback rows: {data["accepted"]} accepted ({data["train_pairs"]} train,
{data["eval_pairs"]} held out), {data["quarantined"]} quarantined ({reasons}), {data["duplicates"]} duplicates{outside}.
Dataset digest `{facts.dataset_digest}`.

## Procedure
SFT: {_sft(facts)}. DPO: loss {" + ".join(plan.dpo.losses)}, beta {plan.dpo.beta:g}, learning rate
{plan.dpo.learning_rate:g} ({plan.dpo.schedule}, warm-up {plan.dpo.warmup_ratio:g}), {plan.dpo_steps} steps of
{plan.dpo.batch_size} pairs, {plan.dpo.epochs:g} epochs, LoRA rank {plan.lora.rank} alpha {plan.lora.alpha},
max length {plan.max_length} tokens, seed {plan.dpo.seed}.
Precision: base weights in {plan.precision}, computed in {plan.compute}. {_engine(facts)}
Versions: {versions}.{_template(facts)}

The settings, as sections of a `dpo_assets` recipe; with the feedback of the digest above they make this model again:

```yaml
{_settings(facts)}
```

## Evaluation on held-out pairs
{_evaluation(facts)}

## Release
{_standing(facts)}

## Checks
{_checks(facts)}

## Limitations
Held-out accuracy says how the policy ranks pairs of this feedback, not how safe or true its answers are. Compare it
with the length baseline: a policy can score well by liking long answers.

## Licence
{_licence(facts)}
"""


def front_matter(facts: CardFacts) -> str:
    """The metadata of the card as YAML, by the Hub client's own classes."""
    from huggingface_hub import EvalResult, ModelCardData

    merged, licence = facts.artifact == "merged", facts.licence
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="preference ranking",
            dataset_type="held-out-preferences",
            dataset_name="held-out pairs of this feedback",
            dataset_split="eval",
            dataset_args={"digest": facts.dataset_digest},
            metric_type="accuracy",
            metric_name=label,
            metric_value=score.value,
            metric_args=_told(score, facts.scores.confidence),
        )
        for label, score in facts.scores.shares
        if math.isfinite(score.value)  # The Hub takes no other number.
    ]
    data = ModelCardData(
        model_name=facts.title,
        license=licence.identifier if licence else None,
        license_name=licence.name if licence else None,
        license_link=_link(facts),
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["dpo", "trl", "dagster", "preference-optimization"],
        base_model=facts.base_source if facts.base_on_hub else None,
        eval_results=results or None,
        **({"base_model_relation": "finetune" if merged else "adapter"} if facts.base_on_hub else {}),
    )
    return str(data.to_yaml(line_break="\n")).strip()


def _told(score: Proportion, level: float) -> dict[str, float | int]:
    """What a score is worth: its interval, and what it was counted over."""
    prompts = {} if score.clusters is None else {"prompts": score.clusters}
    return {"low": score.low, "high": score.high, "level": level, "pairs": score.n, **prompts}


def _link(facts: CardFacts) -> str | None:
    """Where the terms stand: a page, a file of this release, or one of the base's repository."""
    link = facts.licence.link if facts.licence else None
    if link is None or "://" in link or link in facts.licence_files:
        return link
    revision = facts.base_revision or "main"
    return f"{facts.hub.rstrip('/')}/{facts.base_source}/blob/{revision}/{link}" if facts.base_on_hub else None


def _base(facts: CardFacts) -> str:
    revision = f" at revision `{facts.base_revision}`" if facts.base_revision else ""
    licence = in_markdown(facts.licence.identifier) if facts.licence else "licence unknown"
    return f"{in_code(facts.base_source)}{revision} ({licence})"


def _use(facts: CardFacts) -> str:
    release = facts.repo_id or "."  # The folder of this card, for as long as it is nowhere else.
    base = None if facts.artifact == "merged" else (facts.base_source, facts.base_revision)
    snippet = load_snippet(release, base, beyond_text=facts.beyond_text, template_arguments=facts.template_arguments)
    serve = serve_line(release, base, facts.plan.lora.rank, facts.template_arguments)
    return f"```python\n{snippet}\n```\n\nServed by vLLM:\n\n```sh\n{serve}\n```"


def _engine(facts: CardFacts) -> str:
    """What computed each part, as its report says."""
    merge, scored = facts.merge, facts.scores
    parts = [f"Trained by the {facts.training.trainer} trainer on {facts.training.kernels} kernels"]
    if scored.kernels:
        parts.append(f"scored on {scored.kernels} kernels" + (f" as {scored.scored}" if scored.scored else ""))
    if facts.artifact == "merged":
        proven = f", compared in {merge.proven_in}" if merge.proven_in else ""
        parts.append(
            f"merged ({merge.method}): {merge.mean_difference_per_token:.2g} nats per token from base and adapter on "
            f"{merge.probe_pairs} pairs{proven}"
        )
    return f"{'; '.join(parts)}."


def _template(facts: CardFacts) -> str:
    """What whoever asks the model must give its chat template, to ask as it was trained."""
    if not facts.template_arguments:
        return ""
    return f"\nChat template arguments: {in_code(json.dumps(facts.template_arguments, sort_keys=True))}."


def _settings(facts: CardFacts) -> str:
    plan = facts.plan
    base: dict[str, Any] = {"source": facts.base_source}
    if facts.base_revision:
        base["revision"] = facts.base_revision
    if facts.template_arguments:
        base["template_arguments"] = facts.template_arguments
    sections = {
        "feedback": {"max_length": plan.max_length},
        **plan.model_dump(mode="json", include={"lora", "sft", "dpo"}),
        "hardware": {"precision": plan.precision},
    }
    # What others may have written stands on one line, as JSON: no text of theirs begins one, and ends the block.
    told = json.dumps(base, ensure_ascii=False)
    return f"base_model: {told}\n{yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).strip()}"


def _evaluation(facts: CardFacts) -> str:
    scores = facts.scores
    rows = [
        f"| {label} | {score.value:.3f} | [{score.low:.3f}, {score.high:.3f}] | {score.counted} |"
        for label, score in scores.shares
    ]
    return "\n".join(
        [
            f"| score | value | {percent(scores.confidence)} interval | pairs |",
            "|---|---|---|---|",
            *rows,
            "",
            f"{scores.pairs} pairs of {scores.prompts} conversations. Log-probability against SFT, nats per token: "
            f"chosen answers {scores.chosen_shift_nats_per_token:+.3f}, "
            f"rejected {scores.rejected_shift_nats_per_token:+.3f}.",
            "",
            f"Verdict: **{facts.decision}** ({in_markdown(facts.reason)}).",
        ]
    )


def _standing(facts: CardFacts) -> str:
    """Number, predecessor, what the decision cost, who took it, generation depth and withdrawn feedback."""
    one = facts.standing
    told = [
        f"Release {one.number} of the pipeline {in_code(one.pipeline)}{', as a preview' if one.preview else ''}. "
        + (f"It replaces {one.replaces}." if one.replaces else "It is the first.")
    ]
    level = "no test was made for it" if one.level is None else f"one-sided test at a level of {100 * one.level:.2g} %"
    spent = f"{100 * one.spent:.2f} % of {100 * one.alpha:g} % error"
    told.append(f"Decided: {facts.decision}; {level}. All decisions so far spent {spent}.")
    if one.override:
        told.append(f"A person decided, and not the rules: {in_markdown(one.override)}.")
    told.append(_generation(facts))
    if one.replaces:
        told.append(_withdrawn(one.withdrawn))
    return "\n".join(told)


def _generation(facts: CardFacts) -> str:
    """How many trainings on preferences lie behind the policy, and on what the last one was."""
    refresh = facts.plan.refresh
    depth = f"Generation depth: {refresh.generation}. "
    if refresh.whole:
        return depth + "It was trained from SFT on all training pairs, not from an earlier release."
    return (
        depth + f"It went on from an earlier release (`{refresh.policy}`): {refresh.new} new pairs and "
        f"{refresh.sampled} of the earlier ones; the reference stayed SFT."
    )


def _sft(facts: CardFacts) -> str:
    """What SFT was, and what it was trained on where that is not the dataset of this release."""
    sft, strategy = facts.plan.refresh.sft, facts.plan.sft.strategy
    if strategy == "adopt" or sft.dataset in ("", facts.dataset_digest):
        return strategy
    return (
        f"{strategy}, on the {sft.pairs} training pairs of the dataset `{sft.dataset}`, an earlier one: {sft.newer} of "
        "those of now are newer, and none was withdrawn"
    )


def _withdrawn(found: Withdrawn | None) -> str:
    if found is None:
        return "Which feedback was withdrawn since that release cannot be told: its datasets are not kept."
    told = (
        f"Of the feedback rows behind that release, {found.gone} were withdrawn since, and {found.left_out} are still "
        "in the feedback and were left out."
    )
    return told + (f" Of {found.unknown} more it is not known why they are missing." if found.unknown else "")


def _checks(facts: CardFacts) -> str:
    """Every check that was kept, and a word where none was: an override may let a release pass a red one."""
    rows = [
        f"| {asset} | {check} | {OUTCOMES[level]} |"
        for asset, kept in facts.checks.items()
        for check, level in kept.items()
    ]
    return "\n".join(["| asset | check | outcome |", "|---|---|---|", *rows]) if rows else "No outcome was recorded."


def _licence(facts: CardFacts) -> str:
    """The chain: the base's licence, who states it, the texts that came along, and that the release inherits it."""
    if facts.licence is None:
        return "No licence of the base is known. This release must not be handed on."
    texts = ", ".join(in_code(name) for name in facts.licence_files)
    return (
        f"The base is under {in_markdown(facts.licence.shown)}, stated by the {facts.licence.stated_by}. This release "
        f"is made from its weights and inherits its terms{f'; their texts are here: {texts}' if texts else ''}."
    )
