"""Held-out scores of a finished run beside those that RewardBench and lm-evaluation-harness compute of the same models.

    python -m venv /somewhere/scorers
    /somewhere/scorers/bin/pip install -c constraints.txt . "lm-eval==0.4.13"
    /somewhere/scorers/bin/pip install --no-deps rewardbench==0.1.4
    /somewhere/scorers/bin/python -m benchmarks.other_scorers --store $DAGSTER_HOME/storage/dpo_assets/chat

The store is that of a run on a CPU, which scores in fp32. RewardBench's own class for DPO models (`rewardbench/dpo.py`)
gets the pairs' token ids and both models; its log-ratios are held against those of `eval_scores`. The harness's
log-likelihoods are of text: rows whose text it tokenizes as the dataset did are compared. Prints the largest
differences in nats.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_assets.artifact import Artifact
from dpo_assets.feedback.dataset import read_split
from dpo_assets.publishing.trace import Trace

IGNORED, SIDES = -100, ("chosen", "rejected")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a pipeline's artefacts, of a run that went through")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {kind: newest(args.store, kind) for kind in ("base_model", "dpo_dataset", "merged_model", "eval_scores")}
    rows = pairs(found, args.pairs)
    folders = {"sft": found["base_model"].path / "model", "policy": found["merged_model"].path / "model"}
    models = {who: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for who, path in folders.items()}
    print(f"{len(rows)} held-out pairs of {args.store.name}")
    print(f"RewardBench, log-ratios: {reward_bench(models, rows)}")
    for who, folder in folders.items():
        print(f"lm-eval, {who}: {harness(models[who], AutoTokenizer.from_pretrained(folder), rows, who)}")
    return 0


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

    def see(self, ours: float, theirs: float, tokens: int) -> None:
        self.answers += 1
        self.answer = max(self.answer, abs(ours - theirs))
        self.token = max(self.token, abs(ours - theirs) / tokens)

    def __str__(self) -> str:
        return f"{self.answers} answers, largest difference {self.answer:.2e} nats, {self.token:.2e} a token"


def reward_bench(models: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Largest:
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
    largest = Largest()
    for row in rows:
        batch: dict[str, torch.Tensor] = {}
        for side in SIDES:
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            batch[f"{side}_input_ids"] = torch.tensor([[*prompt, *answer]])
            batch[f"{side}_attention_mask"] = torch.ones_like(batch[f"{side}_input_ids"])
            batch[f"{side}_labels"] = torch.tensor([[*[IGNORED] * len(prompt), *answer]])
        with torch.no_grad():
            ratios = scorer.inference_step(batch)
        for side, theirs in zip(SIDES, ratios, strict=True):
            largest.see(row[f"policy_{side}"] - row[f"sft_{side}"], float(theirs), row[f"{side}_tokens"])
    return largest


def harness(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], who: str) -> Largest:
    """Log-likelihoods."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, add_bos_token=False)
    asked: list[Any] = []
    ours: list[tuple[float, int]] = []
    for row in rows:
        for side in SIDES:
            context, answer = (tokenizer.decode(row[name]) for name in ("prompt_ids", f"{side}_ids"))
            whole = tokenizer(context + answer, add_special_tokens=False).input_ids
            alone = tokenizer(context, add_special_tokens=False).input_ids
            if alone == row["prompt_ids"] and whole == row["prompt_ids"] + row[f"{side}_ids"]:
                asked.append(Instance("loglikelihood", {}, (context, answer), len(asked)))
                ours.append((row[f"{who}_{side}"], row[f"{side}_tokens"]))
    largest = Largest()
    for (score, tokens), (theirs, _) in zip(ours, lm.loglikelihood(asked, disable_tqdm=True), strict=True):
        largest.see(score, theirs, tokens)
    return largest


if __name__ == "__main__":
    sys.exit(main())
