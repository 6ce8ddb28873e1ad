"""flash-pref's DPO trainer, which shares prompts too, on the pairs and the weights of the throughput benchmark.

    python -m benchmarks.throughput.models 8b FOLDER          # in the usual environment, if no folder is left from it
    PYTHONPATH=SITE:benchmarks/flash_attn_stand_in:. python benchmarks/flash_pref.py --folder FOLDER --cap 25

flash-pref 0.1.1 needs transformers < 4.52 and the TRL of its time, so it has an environment of its own: SITE holds
transformers 4.51.3, tokenizers 0.21.4, huggingface_hub 0.36.0, trl 0.17.0, peft 0.15.2, accelerate 1.7.0 and flash-pref
(`gpu_wheels.py`, batch `flash_pref`), before everything else on the path. It imports flash-attn, of which there is no
wheel; PyTorch's own build of these kernels stands in for it. Rows are appended to --out as the benchmark writes them.
"""

from __future__ import annotations

# ruff: noqa: E402
import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
# PEFT of that time asks today's torchao for a name that it has no more; nothing here needs either.
sys.modules["torchao"] = None  # type: ignore[assignment]

import torch
from datasets import Dataset
from flash_pref import FlashDPOTrainer  # type: ignore[import-not-found]
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig

from benchmarks.throughput import data
from benchmarks.throughput.arithmetic import limit_pairs_per_s, read_arithmetic, work_of
from benchmarks.throughput.measure import Block, free_memory, is_out_of_memory, memory_cap, seed_adapter, train, unwrap
from benchmarks.throughput.shapes import LLAMA_TARGETS, LORA_RANK

ARM, MAX_LENGTH, SEED = "flash_pref-bf16", 1_024, 42


class TokenRows(FlashDPOTrainer):  # type: ignore[misc]
    """For rows that are token ids already, in their order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept_losses: list[Any] = []
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.kept_losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the model, as the benchmark writes it")
    parser.add_argument("--cap", type=float, default=25.0, help="GiB of the allocator")
    parser.add_argument("--case", default="8b-bf16")
    parser.add_argument("--micro-batches", default="8,4,2,16", help="tried in this order; the fastest is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--rope-theta", type=float, default=500_000.0, help="Transformers 4 reads it under another name"
    )
    parser.add_argument("--attention", default="flash_attention_2")
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows' lengths")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "flash_pref.jsonl")
    args = parser.parse_args()
    run, model, speeds = f"{time.time():.0f}", load(args), dict[int, float]()

    def step(kind: str, micro: int, warmup: int, steps: int, **more: Any) -> dict[str, Any]:
        row = {"kind": kind, "model": args.case.partition("-")[0], "run": run, "case": args.case, "arm": ARM}
        row |= {"micro_batch": micro, "cap_gib": args.cap, "overrides": {}, **more}
        try:
            row |= measured(model, args, micro, warmup, steps)
        except Exception as error:  # Out of memory is how a search ends.
            traceback.print_exc()
            row |= {"error": f"{type(error).__name__}: {error}"[:400], "out_of_memory": is_out_of_memory(error)}
        free_memory()
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "losses"}), flush=True)
        return row

    for micro in map(int, args.micro_batches.split(",")):
        row = step("search", micro, 1, 2)
        if "error" not in row:
            speeds[micro] = 16 / min(row["step_seconds"])
        elif not row["out_of_memory"]:
            return 1
    if not speeds:
        return 1
    best = max(speeds, key=lambda micro: speeds[micro])
    for repeat in range(1, args.repeats + 1):
        step("time", best, 1, args.steps, repeat=repeat)
    return 0


def load(args: argparse.Namespace) -> Any:
    """The base under a new adapter is made by the trainer; this keeps the base, its tokenizer and what it costs."""
    config = AutoConfig.from_pretrained(args.folder, rope_theta=args.rope_theta)
    place = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        args.folder, config=config, torch_dtype=dtype, attn_implementation=args.attention, **place
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return {"base": base, "tokenizer": tokenizer, "corpus": data.read_corpus(args.folder)}


def measured(model: dict[str, Any], args: argparse.Namespace, micro: int, warmup: int, steps: int) -> dict[str, Any]:
    """One run of the trainer from the benchmark's adapter."""
    cuda = torch.cuda.is_available()
    rows = data.block(partial(_rows, model["corpus"], args.scale), warmup, steps)
    named = [{f"{key.removesuffix('_ids')}_input_ids": row[key] for key in row} for row in rows]
    block = Block(warmup, steps, MAX_LENGTH, micro, args.cap)
    with memory_cap(args.cap) as peaks:
        trainer = TokenRows(
            model=model["base"],
            args=arguments(block, cuda),
            train_dataset=Dataset.from_list(named),
            processing_class=model["tokenizer"],
            peft_config=LoraConfig(
                r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(LLAMA_TARGETS), bias="none",
                task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        try:
            seed_adapter(trainer.model)
            seconds, each = train(trainer, block)
        finally:
            model["base"] = unwrap(trainer).unload()
            for name in ("forward", "peft_config"):  # What the trainer and PEFT put there, for the next run.
                model["base"].__dict__.pop(name, None)
    micro_losses = torch.stack(trainer.kept_losses).tolist()
    parts = len(micro_losses) // (warmup + steps)
    losses = [statistics.fmean(micro_losses[n : n + parts]) for n in range(0, len(micro_losses), parts)]
    work = work_of(rows[warmup * data.PAIRS_PER_STEP :], MAX_LENGTH)
    speed, limit = work.pairs / seconds, limit_pairs_per_s(read_arithmetic(args.folder), work)
    return {
        "seconds": seconds, "step_seconds": each, "losses": losses, "first_loss_minus_ln2": losses[0] - math.log(2),
        "pairs_per_s": speed, "cold_pairs_per_s": speed, "limit_pairs_per_s": limit,
        "share_of_limit": speed / limit if cuda else None, **peaks,
    }  # fmt: skip


def _rows(corpus: list[int], scale: float, count: int, seed: int) -> list[data.Row]:
    return data.like_ultrafeedback(corpus, count, seed, scale)


def arguments(block: Block, cuda: bool) -> Any:
    """As the benchmark's other peers have them, under the names of TRL 0.17."""
    assert block.micro_batch is not None
    return DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="dpo-throughput-"),
        max_steps=block.warmup + block.steps,
        per_device_train_batch_size=block.micro_batch,
        gradient_accumulation_steps=data.PAIRS_PER_STEP // block.micro_batch,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=block.max_grad_norm,
        optim="adamw_torch",
        beta=0.1,
        loss_type="sigmoid",
        max_length=block.max_length,
        max_prompt_length=None,
        truncation_mode="keep_start",
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        precompute_ref_log_probs=False,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )


if __name__ == "__main__":
    sys.exit(main())
