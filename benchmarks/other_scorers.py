"""Held-out scores of a finished run beside those that RewardBench and lm-evaluation-harness compute of the same models.

    python -m venv /somewhere/scorers
    /somewhere/scorers/bin/pip install -c constraints.txt . "lm-eval==0.4.13"
    /somewhere/scorers/bin/pip install --no-deps rewardbench==0.1.4
    /somewhere/scorers/bin/python -m benchmarks.other_scorers --store $DAGSTER_HOME/storage/dpo_assets/chat

RewardBench's own class for DPO models (`rewardbench/dpo.py`) gets the pairs' token ids and both models; its log-ratios
are held against those of the pipeline's scorer. The harness's log-likelihoods are of text: rows whose text it tokenizes
as the dataset did are compared. All of it in fp64 too, where what is left of a difference is one of arithmetic: in fp32
each is off by rounding of its own, and the last table says how far from fp64. Prints the largest differences in nats.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import polars as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_assets.artifact import Artifact
from dpo_assets.feedback.dataset import read_split
from dpo_assets.publishing.trace import Trace
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.scoring.logprobs import score_groups

IGNORED, SIDES, BUDGET = -100, ("chosen", "rejected"), 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a pipeline's artefacts, of a run that went through")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {kind: newest(args.store, kind) for kind in ("base_model", "dpo_dataset", "merged_model", "eval_scores")}
    rows = pairs(found, args.pairs)
    print(f"{len(rows)} held-out pairs of {args.store.name}")
    exact, rounded = scored(found, rows, torch.float64), scored(found, rows, torch.float32)
    written = {who: [row[f"{who}_{side}"] for row in rows for side in SIDES] for who in ("sft", "policy")}
    print("\nHow far from fp64, nats an answer")
    tokens = [row[f"{side}_tokens"] for row in rows for side in SIDES]
    for name, by_model in ((OURS, rounded[OURS]), (THEIRS, rounded[THEIRS]), ("eval_scores.parquet", written)):
        for who, logps in by_model.items():
            print(f"{name}, {who}: {Largest.of(logps, exact[OURS][who], tokens)}")
    ratios = [[p - s for p, s in zip(by["policy"], by["sft"], strict=True)] for by in (rounded[OURS], exact[OURS])]
    print(f"{OURS}, log-ratio: {Largest.of(ratios[0], ratios[1], tokens)}")
    return 0


ByModel = dict[str, list[float]]  # Summed log-probability of each answer, pair by pair, chosen first.
OURS, THEIRS = "this scorer", "plain forward, log_softmax"


def scored(found: dict[str, Artifact], rows: Sequence[dict[str, Any]], dtype: torch.dtype) -> dict[str, ByModel]:
    """Holds the packages' numbers against this scorer's, all in `dtype`; returns this one's and a plain forward's."""
    folders = {"sft": found["base_model"].path / "model", "policy": found["merged_model"].path / "model"}
    models = {who: AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for who, path in folders.items()}
    groups = [Group(row["prompt_ids"], tuple(row[f"{side}_ids"] for side in SIDES)) for row in rows]
    theirs = {who: [plain(model, group, n) for group in groups for n in range(2)] for who, model in models.items()}
    told = {who: harness(model, AutoTokenizer.from_pretrained(folders[who]), rows) for who, model in models.items()}
    ratios = reward_bench(models, rows)
    ours = {
        who: score_groups(model, groups, BUDGET)[0] for who, model in models.items()
    }  # Last: an engine is attached.
    tokens = [row[f"{side}_tokens"] for row in rows for side in SIDES]
    print(f"\n{str(dtype).removeprefix('torch.')}, beside this scorer, nats an answer")
    own = [p - s for p, s in zip(ours["policy"], ours["sft"], strict=True)]
    print(f"RewardBench, log-ratio: {Largest.of(own, ratios, tokens)}")
    for who, (asked, logps) in told.items():
        own, long = score_groups(models[who], asked, BUDGET)
        print(f"lm-eval, {who}: {Largest.of(own, logps, long)}")
    return {OURS: ours, THEIRS: theirs}


@torch.no_grad()
def plain(model: Any, group: Group, answer: int) -> float:
    """As most score: one row through the model, `log_softmax`, and a sum."""
    wanted = torch.tensor(group.completions[answer])
    row = torch.tensor([[*group.prompt, *group.completions[answer]]])
    logits = model(row, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum())


def newest(store: Path, kind: str) -> Artifact:
    return next(Trace.of(store).tree.listed(kind))


def pairs(found: dict[str, Artifact], most: int) -> list[dict[str, Any]]:
    """Token ids of each scored pair, and what `eval_scores` wrote of it."""
    scores = pl.read_parquet(found["eval_scores"].path / "scores.parquet")
    ids = read_split(found["dpo_dataset"].path, "eval", ["pair_id", "prompt_ids", "chosen_ids", "rejected_ids"])
    found_rows: list[dict[str, Any]] = scores.join(ids, on="pair_id").head(most).to_dicts()
    for row in found_rows:  # As far as they were scored: a row ends at max_length.
        for side in SIDES:
            row[f"{side}_ids"] = row[f"{side}_ids"][: row[f"{side}_tokens"]]
    return found_rows


@dataclass
class Largest:
    """The largest differences, in nats: of an answer, and of an answer by its tokens."""

    answers: int = 0
    answer: float = 0.0
    token: float = 0.0

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float], tokens: Sequence[int]) -> Self:
        found = cls()
        for one, other, long in zip(ours, theirs, tokens, strict=True):
            found.answers += 1
            found.answer = max(found.answer, abs(one - other))
            found.token = max(found.token, abs(one - other) / long)
        return found

    def __str__(self) -> str:
        return f"{self.answers} answers, largest difference {self.answer:.2e} nats, {self.token:.2e} a token"


def reward_bench(models: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[float]:
    """Log-ratios, policy over SFT."""
    place = Path(importlib.util.find_spec("rewardbench").submodule_search_locations[0])  # type: ignore[union-attr, index]
    # By its file: the package imports serving libraries that scoring does not need.
    spec = importlib.util.spec_from_file_location("rewardbench_dpo", place / "dpo.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scorer = module.DPOInference(
        models["policy"], models["sft"], SimpleNamespace(pad_token_id=0), SimpleNamespace(device="cpu")
    )
    found: list[float] = []
    for row in rows:
        batch: dict[str, torch.Tensor] = {}
        for side in SIDES:
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            batch[f"{side}_input_ids"] = torch.tensor([[*prompt, *answer]])
            batch[f"{side}_attention_mask"] = torch.ones_like(batch[f"{side}_input_ids"])
            batch[f"{side}_labels"] = torch.tensor([[*[IGNORED] * len(prompt), *answer]])
        with torch.no_grad():
            found += map(float, scorer.inference_step(batch))
    return found


def harness(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> tuple[list[Group], list[float]]:
    """Log-likelihoods, and what they are of: lm-eval counts white space that ends a context as the answer's.

    Rows whose text reads back as other tokens are not asked.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, add_bos_token=False)
    asked: list[Any] = []
    groups: list[Group] = []
    for row in rows:
        for side in SIDES:
            ids = [*row["prompt_ids"], *row[f"{side}_ids"]]
            context, answer = (tokenizer.decode(row[name]) for name in ("prompt_ids", f"{side}_ids"))
            given = tokenizer(context.rstrip(), add_special_tokens=False).input_ids
            if tokenizer(context + answer, add_special_tokens=False).input_ids == ids and ids[: len(given)] == given:
                asked.append(Instance("loglikelihood", {}, (context, answer), len(asked)))
                groups.append(Group(given, (ids[len(given) :],)))
    return groups, [logp for logp, _ in lm.loglikelihood(asked, disable_tqdm=True)]


if __name__ == "__main__":
    sys.exit(main())
