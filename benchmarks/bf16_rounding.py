"""What bf16 does to the first steps of a LoRA: PEFT's two roundings and the fused layers' one, beside fp32. On a CPU.

    python benchmarks/bf16_rounding.py

A small Llama with random weights that bf16 can hold, one batch of 16 pairs seen at every step, AdamW at 1e-4, beta 0.1,
the reference scored by the same forward. Prints the loss of each step. About two minutes on one thread.
"""

from __future__ import annotations

import math
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.fused.decoder import attach_fused
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.scoring.logprobs import score_tokens, sequence_logps

WIDTH, LAYERS, VOCABULARY, STEPS, RATE, BETA = 384, 6, 2_000, 8, 1e-4, 0.1


def main() -> None:
    torch.set_num_threads(1)
    attention.register()
    pairs = batch_of_pairs()
    for name, dtype, fused in (
        ("fp32", torch.float32, False),
        ("bf16, fused layers", torch.bfloat16, True),
        ("bf16, PEFT", torch.bfloat16, False),
    ):
        losses = train(policy(dtype, fused), pairs, dtype)
        print(f"| {name} |", " | ".join(f"{loss:.4f}" for loss in losses), "|", flush=True)


def batch_of_pairs() -> list[Group]:
    """Chosen and rejected answers draw from different parts of the vocabulary, so there is much to learn."""
    rng = random.Random(0)

    def ids(count: int, low: int, high: int) -> list[int]:
        return [rng.randrange(low, high) for _ in range(count)]

    return [
        Group(
            ids(8, 0, VOCABULARY), (ids(rng.randrange(15, 50), 0, 1_200), ids(rng.randrange(15, 50), 800, VOCABULARY))
        )
        for _ in range(16)
    ]


def policy(dtype: torch.dtype, fused: bool) -> Any:
    torch.manual_seed(1234)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=512, initializer_range=0.06,
        attn_implementation=attention.NAME,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(torch.bfloat16).to(dtype)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.data = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
    if fused and (reason := attach_fused(model, dtype)):
        raise SystemExit(reason)
    return model


def train(model: Any, pairs: list[Group], dtype: torch.dtype) -> list[float]:
    """The loss of each step."""
    batch, half = pack(pairs), dtype != torch.float32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)

    def margins() -> torch.Tensor:
        engine_of(model).renew()
        logps = sequence_logps(score_tokens(model, batch, torch.autocast("cpu", torch.bfloat16, enabled=half)), batch)
        return logps.view(-1, 2)[:, 0] - logps.view(-1, 2)[:, 1]

    with torch.no_grad():
        reference = margins()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(BETA * (margins() - reference)).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    main()
