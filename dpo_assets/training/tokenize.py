"""Stage `tokenize`: pairs of messages to token ids, by the base model's own chat template."""

from __future__ import annotations

import time
from typing import Any

import polars as pl

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.contract import Progress, TokenizeSpec
from dpo_assets.training.reporting import Reporter

PROGRESS_EVERY = 2000


def run(spec: TokenizeSpec, reporter: Reporter) -> None:
    """Writes `tokens.parquet`: pair_id, prompt_ids, chosen_ids, rejected_ids, boundary_fault."""
    # Not through `loading`, which would add PEFT; AutoTokenizer alone imports torch already, so this saves little.
    from transformers import AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model, local_files_only=True)
    pairs = pl.read_parquet(spec.pairs, columns=["pair_id", "prompt", "chosen", "rejected"])
    rows = []
    for n, pair in enumerate(pairs.iter_rows(named=True), start=1):
        rows.append({"pair_id": pair["pair_id"], **tokenize_pair(tokenizer, pair)})
        if n % PROGRESS_EVERY == 0 or n == pairs.height:
            reporter.log(Progress(stage="tokenize", done=n, total=pairs.height).line())
    ids = pl.List(pl.Int32)
    schema = {
        "pair_id": pl.String,
        "prompt_ids": ids,
        "chosen_ids": ids,
        "rejected_ids": ids,
        "boundary_fault": pl.Boolean,
    }
    pl.DataFrame(rows, schema=schema).write_parquet(spec.output_dir / "tokens.parquet")
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})


def tokenize_pair(tokenizer: Any, pair: dict[str, Any]) -> dict[str, Any]:
    """Token ids of a pair, as TRL 1.15 makes them: the completion starts where prompt and conversation diverge."""

    def render(messages: list[dict[str, str]], *, answer_follows: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=answer_follows, return_dict=True
        )["input_ids"]
        return ids

    prompt = render(pair["prompt"], answer_follows=True)
    chosen = render(pair["prompt"] + pair["chosen"], answer_follows=False)
    rejected = render(pair["prompt"] + pair["rejected"], answer_follows=False)
    length = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    return {
        "prompt_ids": prompt[:length],
        "chosen_ids": chosen[length:],
        "rejected_ids": rejected[length:],
        "boundary_fault": length < len(prompt),
    }


def _common_prefix(a: list[int], b: list[int]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
