"""Where the time of a packed DPO step goes on this GPU: fused layers beside Transformers with PEFT, no trainer around.

    python benchmarks/engine_profile.py --model 8b --dtype bf16 --budget 4096 --recompute 0 --profile

Random weights of a published shape, LoRA r16 on its linear layers, pairs of UltraFeedback-like lengths. Prints one JSON
line per measurement: pairs a second of training (forward and backward of 16 pairs) and of scoring, and the peak of
memory beside its estimate.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM

from benchmarks.throughput.models import configuration
from benchmarks.throughput.shapes import LORA_RANK, SHAPES, is_tiny
from dpo_assets.planning.memory import Training
from dpo_assets.planning.shape import ModelShape
from dpo_assets.recipe import LoraSection
from dpo_assets.training.batches.packing import Group, balanced, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.fused.decoder import attach_fused
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps

PAIRS, BETA = 16, 0.1
KERNELS_SHOWN = 28


def main() -> None:
    args = _arguments()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    attention.register()
    model = build(args.model, dtype, device)
    steps = [pairs(seed, args.model) for seed in range(args.steps)]
    for kernels in args.kernels.split(","):
        if kernels == "fused":
            reason = attach_fused(model, dtype, args.recompute)
            if reason:
                raise SystemExit(reason)
        autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
        # Autocast casts the adapter's weights; PEFT's cast of its inputs to fp32 would only cost memory.
        measure(model, kernels, steps, args, autocast)
        if args.profile:
            with disable_input_dtype_casting(model), autocast:
                profile("training", partial(dpo_step, model, steps[0], args.budget))
                profile("scoring", partial(score_groups, model, steps[0], args.budget))


def measure(model: Any, kernels: str, steps: list[list[Group]], args: argparse.Namespace, autocast: Any) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with disable_input_dtype_casting(model), autocast:
        first = dpo_step(model, steps[0], args.budget)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        train = [timed(partial(dpo_step, model, groups, args.budget)) for groups in steps]
        score = [timed(partial(score_groups, model, groups, args.budget)) for groups in steps]
    tokens = [sum(g.tokens for g in groups) for groups in steps]
    row = {
        "kernels": kernels, "model": args.model, "dtype": args.dtype, "budget": args.budget,
        "recompute": args.recompute, "train_pairs_per_s": PAIRS / statistics.median(train[1:]),
        "score_pairs_per_s": PAIRS / statistics.median(score[1:]),
        "tokens_per_step": statistics.mean(tokens), "train_s": train, "peak_gib": peak,
        "estimate_gib": estimate(model, args), "loss": first,
    }  # fmt: skip
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def dpo_step(model: Any, groups: list[Group], budget: int) -> float:
    """Forward and backward of 16 pairs against a reference of zero shift; the adapter's gradients are dropped."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=causal_lm(model).device)
    for run in balanced(groups, [g.tokens for g in groups], budget):
        batch = pack(run).to(causal_lm(model).device)
        logps = sequence_logps(score_tokens(model, batch), batch).view(-1, 2)
        margin = (logps - logps.detach()).diff(dim=1)
        loss = -torch.nn.functional.logsigmoid(BETA * margin).sum() / len(groups)
        loss.backward()
        total += loss.detach()
    return float(total)


def timed(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def profile(what: str, call: Callable[[], Any]) -> None:
    """The kernels that take the most time, and for how much of it the GPU had none."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        seconds = timed(call)
    kernels = sorted(found.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e6
    print(f"{what}: {seconds * 1e3:.1f} ms, kernels {busy * 1e3:.1f} ms")
    for kernel in kernels[:KERNELS_SHOWN]:
        total = kernel.self_device_time_total
        each = f"{kernel.count:5d} x {total / kernel.count:8.1f} us"
        print(f"{total / 1e4 / busy:5.1f}% {total / 1e3:8.2f} ms {each}  {kernel.key[:110]}")


def build(name: str, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(1234)
    config = configuration(SHAPES[name])
    config._attn_implementation = attention.NAME
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    targets = list(SHAPES[name].targets)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def pairs(seed: int, name: str) -> list[Group]:
    """16 pairs of log-normal lengths (medians 120 and 285 / 265 tokens), rows cut to 1024."""
    rng = random.Random(seed)
    scale, vocabulary = (0.1, 8000) if is_tiny(name) else (1.0, 100_000)

    def ids(median: float, sigma: float, low: int, high: int) -> list[int]:
        length = int(min(max(rng.lognormvariate(math.log(median), sigma), low), high) * scale) or 1
        return [rng.randrange(vocabulary) for _ in range(length)]

    groups = []
    for _ in range(PAIRS):
        prompt, chosen, rejected = ids(120, 1.0, 12, 512), ids(285, 0.75, 8, 2048), ids(265, 0.8, 8, 2048)
        groups.append(Group(prompt, (chosen, rejected)).truncated(1024))
    return groups


def estimate(model: Any, args: argparse.Namespace) -> float:
    config = causal_lm(model).config
    shape = ModelShape(
        parameters=sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n),
        layers=config.num_hidden_layers, hidden=config.hidden_size, intermediate=config.intermediate_size,
        vocabulary=config.vocab_size, context=8192, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, head_dim=config.head_dim, tied=config.tie_word_embeddings,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Training(shape, args.dtype, "fused", LoraSection(), device).peak(args.budget, args.recompute)  # type: ignore[arg-type]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--kernels", default="transformers,fused", help="in this order; fused stays attached")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a forward")
    parser.add_argument("--recompute", type=int, default=0, help="layers whose activations are computed again")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the most time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
