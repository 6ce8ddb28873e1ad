"""Stage `evaluate`: held-out pairs and greedy answers, for the SFT policy and for what is released.

Implicit reward (Rafailov et al., arXiv 2305.18290, section 4): log pi(y|x) - log pi_ref(y|x), summed over the answer
with its EOS. RewardBench's DPO mode uses the same masks and sums.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import polars as pl

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.evidence.clusters import clustered_mean, clustered_share, pick_the_longer, wins_of
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.evidence.slices import Part, SliceScore, parts
from dpo_assets.checks.reports import AnswerHealth, EvaluationReport, GreedyAnswers
from dpo_assets.contract import EvaluateSpec, Progress
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.data import dpo_group, first_asked, load_asked
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import ChatFormat, load_chat_format
from dpo_assets.training.models.loading import autocast_of
from dpo_assets.training.policy import load_scored
from dpo_assets.training.reporting import Reporter
from dpo_assets.training.scoring.generation import generate, generation_health
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import Settled, alike, settle_engine

OF_A_PAIR = ["prompt_id", "source", "margin"]  # Columns of the dataset that the per-pair table keeps.
SLICE_DRAWS = 2_000  # Of the bootstrap for each part: there may be a dozen.


def run(spec: EvaluateSpec, reporter: Reporter) -> None:
    """Writes `scores.parquet` (a row a pair), `generations.json` and `report.json`."""
    plan = spec.plan.at_release()
    started = time.perf_counter()
    chat = load_chat_format(spec.base_model, spec.template)
    held_out = load_asked(spec.dataset, "eval", spec.scratch, OF_A_PAIR)
    to_group = partial(dpo_group, max_length=plan.max_length)
    groups = [to_group(row) for row in held_out]
    room = plan.max_length - spec.max_new_tokens
    asked = first_asked(held_out, chat, spec.generations, room, by="prompt_id")
    prompts = [ids for _, ids in asked]

    reporter.log(f"evaluate: the policy is the {spec.plan.scored}: {plan.scoring.reason}")

    merged = plan.scoring.subject == "merged"
    compared = (
        ("SFT", spec.base_model, spec.sft_adapter),
        ("policy", spec.policy, None) if merged else ("policy", spec.base_model, spec.adapter),
    )
    measure = partial(_measured, held_out=(groups, prompts), chat=chat, plan=plan, spec=spec, reporter=reporter)
    (settled, sft), (_, policy) = alike([partial(measure, *subject) for subject in compared])
    answers, policy_answers = sft.answers, policy.answers

    table = _score_table({name: held_out[name] for name in ("pair_id", *OF_A_PAIR)}, groups, sft.logps, policy.logps)
    table.write_parquet(spec.output_dir / "scores.parquet")
    write_json(
        spec.output_dir / "generations.json",
        [
            {"prompt": row["prompt"], "sft": before["text"], "policy": after["text"]}
            for (row, _), before, after in zip(asked, answers, policy_answers, strict=True)
        ],
    )
    health = GreedyAnswers(
        sft=AnswerHealth.model_validate(generation_health(answers)),
        policy=AnswerHealth.model_validate(generation_health(policy_answers)),
    )
    report = summarise(table, spec.confidence, scored=spec.plan.scored, settled=settled, generation=health)
    report.write(spec.output_dir)
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})


@dataclass(frozen=True)
class _Measured:
    logps: list[float]
    answers: list[dict[str, Any]]


def _measured(
    who: str,
    folder: Path,
    adapter: Path | None,
    first: str | None,
    *,
    held_out: tuple[list[Group], list[list[int]]],
    chat: ChatFormat,
    plan: TrainingPlan,
    spec: EvaluateSpec,
    reporter: Reporter,
) -> tuple[Settled, _Measured]:
    """Scores of all held-out pairs and answers to the prompts, by a model that is loaded for it and let go."""
    groups, prompts = held_out
    model = load_scored(folder, plan, adapter)
    settled = settle_engine(model, plan, max(groups, key=lambda group: group.longest_row), first)
    if settled.note:
        reporter.log(f"evaluate: {who} computed by {settled.kernels}, not by {first or plan.kernels}: {settled.note}")
    with autocast_of(plan):
        logps, _ = score_groups(model, groups, plan.token_budget)
        reporter.log(f"evaluate: {len(groups)} held-out pairs scored by the {who}")
        answers = generate(model, prompts, chat, spec.max_new_tokens)
    reporter.log(Progress(stage="evaluate", done=1 if who == "SFT" else 2, total=2, note=f"{who} done").line())
    del model
    gc.collect()
    return settled, _Measured(logps, answers)


def summarise(
    table: pl.DataFrame, confidence: float, *, scored: str, settled: Settled, generation: GreedyAnswers
) -> EvaluationReport:
    """Scores with intervals over prompts, from the per-pair table: pairs of one prompt are no independent evidence."""
    chosen_ratio = (table["policy_chosen"] - table["sft_chosen"]) / table["chosen_tokens"]
    rejected_ratio = (table["policy_rejected"] - table["sft_rejected"]) / table["rejected_tokens"]
    margin = (table["policy_chosen"] - table["sft_chosen"]) - (table["policy_rejected"] - table["sft_rejected"])
    prompts = table["prompt_id"].to_list()

    def logp_wins(who: str) -> list[float]:
        gap = table[f"{who}_chosen"] / table["chosen_tokens"] - table[f"{who}_rejected"] / table["rejected_tokens"]
        return wins_of(gap.to_list())

    share = partial(clustered_share, prompts=prompts, confidence=confidence)
    against = partial(compare, prompts=prompts, confidence=confidence)
    rewarded, ranked, ranked_before = wins_of(margin.to_list()), logp_wins("policy"), logp_wins("sft")

    def slice_of(part: Part) -> SliceScore:
        def of_part(values: Sequence[Any]) -> list[Any]:
            return [values[n] for n in part.pairs]

        own = of_part(prompts)
        return SliceScore(
            part.by,
            part.name,
            clustered_share(of_part(rewarded), own, confidence),
            compare(of_part(ranked), of_part(ranked_before), own, confidence, draws=SLICE_DRAWS),
        )

    return EvaluationReport(
        pairs=table.height,
        prompts=len(set(prompts)),
        implicit_reward_accuracy=share(rewarded),
        logp_accuracy_sft=share(ranked_before),
        logp_accuracy_policy=share(ranked),
        pick_the_longer=pick_the_longer(
            table["chosen_tokens"].to_list(), table["rejected_tokens"].to_list(), prompts, confidence
        ),
        reward_against_chance=against(rewarded, [0.5] * table.height),
        logp_against_sft=against(ranked, ranked_before),
        margin=clustered_mean(margin.to_list(), prompts, confidence),
        slices=tuple(slice_of(part) for part in parts(table["source"].to_list(), table["margin"].to_list())),
        margin_mean_nats=fmean(margin),
        margin_median_nats=median(margin),
        chosen_shift_nats_per_token=fmean(chosen_ratio),
        rejected_shift_nats_per_token=fmean(rejected_ratio),
        nll_ratio_chosen=float(table["policy_chosen"].sum() / table["sft_chosen"].sum()),
        confidence=confidence,
        scored=scored,
        kernels=settled.kernels,
        kernels_note=settled.note,
        generation=generation,
    )


def _score_table(
    of_a_pair: Mapping[str, Sequence[Any]], groups: list[Group], reference: list[float], policy: list[float]
) -> pl.DataFrame:
    return pl.DataFrame(
        {
            **{name: list(values) for name, values in of_a_pair.items()},
            "sft_chosen": reference[::2],
            "sft_rejected": reference[1::2],
            "policy_chosen": policy[::2],
            "policy_rejected": policy[1::2],
            "chosen_tokens": [len(g.completions[0]) for g in groups],
            "rejected_tokens": [len(g.completions[1]) for g in groups],
        }
    )
