"""Measured training blocks on an H100 and an H200: what was asked for, pairs a second, and peak memory.

Medians of the repeats of `benchmarks/dpo_throughput.py` and `length_cost.py`, as in benchmarks/results and
benchmarks/RESULTS.md; of 2026-11-27 by the same script with other shapes: Gemma 3, Phi-4-mini, OLMo 3, SmolLM3 and
Ministral 3 have one repeat, which is no median. Random weights, LoRA r16 on all linear layers, 16 pairs a step, lengths
like UltraFeedback's or near max_length. Blocks of `trl` are TRL's own trainer, on Transformers' layers or Unsloth's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpo_assets.planning.families import describe
from dpo_assets.planning.memory import Training
from dpo_assets.planning.precision import Precision
from dpo_assets.planning.shape import Kernels, ModelShape, Trainer
from dpo_assets.planning.sizes import find_model
from dpo_assets.planning.work import Work
from dpo_assets.recipe import LoraSection

LORA = LoraSection(rank=16)
PAIRS = 16
PAIR, PROMPT, LONGEST = 841.8, 172.1, 1_892  # Tokens of UltraFeedback's lengths, cut at 1,024.


def _shape(parameters: int, tied: bool = True, **config: Any) -> ModelShape:
    decoder = describe(config | {"tie_word_embeddings": tied})
    assert decoder is not None
    return ModelShape(
        parameters=parameters, layers=len(decoder.layers), hidden=decoder.hidden, vocabulary=decoder.vocabulary,
        intermediate=config["intermediate_size"], context=32_768, heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], head_dim=config["head_dim"], tied=tied, decoder=decoder,
        model_type=decoder.family,
    )  # fmt: skip


_QWEN3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "1b": find_model("1b").shape,
    "8b": find_model("8b").shape,
    "qwen3-8b": _shape(
        8_190_735_360, tied=False, hidden_size=4_096, intermediate_size=12_288, num_hidden_layers=36,
        num_attention_heads=32, **_QWEN3,
    ),
    "qwen3-1.7b": _shape(
        1_720_574_976, hidden_size=2_048, intermediate_size=6_144, num_hidden_layers=28, num_attention_heads=16,
        **_QWEN3,
    ),
    "gemma3-4b": _shape(
        3_880_099_328, model_type="gemma3_text", vocab_size=262_208, hidden_size=2_560, intermediate_size=10_240,
        num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1_024,
    ),
    **{key: find_model(key).shape for key in ("phi4-mini", "olmo3-7b", "smollm3-3b", "ministral3-8b")},
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A measured block. `peak_gib` is what the allocator had given out; None where it was not told."""

    model: str
    precision: Precision
    kernels: Kernels
    cap_gib: float | None
    budget: int
    recomputed: int
    pairs_per_s: float
    peak_gib: float | None
    trainer: Trainer = "packed"
    micro_batch: int = 0
    card: str = "h100"
    max_length: int = 1_024
    mean_pair: float = PAIR
    mean_prompt: float = PROMPT
    longest: int = LONGEST
    one_scratch: bool = False  # Before what blocks end with was dequantised into a matrix of its own.

    @property
    def label(self) -> str:
        what = f"{self.trainer} {self.micro_batch}" if self.trainer == "trl" else f"{self.budget}"
        length = "" if self.mean_pair == PAIR else f" {self.max_length}x{self.mean_pair:.0f}"
        return f"{self.model} {self.precision} {self.kernels} {what}/{self.recomputed} {self.card}{length}"

    @property
    def training(self) -> Training:
        return Training(SHAPES[self.model], self.precision, self.kernels, LORA, "cuda", trainer=self.trainer)

    @property
    def work(self) -> Work:
        return Work(
            PAIRS, self.longest, self.mean_pair, self.mean_prompt, self.max_length, self.trainer, self.micro_batch
        )


def _classic(
    model: str, precision: Precision, kernels: Kernels, cap: float | None, micro_batch: int, recomputed: int,
    pairs_per_s: float, peak: float, card: str = "h100",
) -> Block:  # fmt: skip
    budget = 2 * micro_batch * 1_024
    return Block(model, precision, kernels, cap, budget, recomputed, pairs_per_s, peak, "trl", micro_batch, card)


def _long(max_length: int, pair: float, rows: float, pairs_per_s: float, peak: float) -> Block:
    """1B without a cap, both rows of every pair near `max_length`: mean tokens of a pair and of its two rows."""
    longest = round(1.03 * pair)
    budget = min(32_768, round(pair * PAIRS * 1.15))
    return Block(
        "1b", "bf16", "fused", None, budget, 0, pairs_per_s, peak, max_length=max_length, mean_pair=pair,
        mean_prompt=rows - pair, longest=longest,
    )  # fmt: skip


BLOCKS = (
    Block("8b", "4bit", "fused", 10.3, 5_248, 29, 14.22, 9.519, one_scratch=True),
    Block("8b", "bf16", "fused", 25.0, 2_624, 0, 18.69, 23.473),
    Block("8b", "bf16", "fused", None, 15_579, 0, 20.00, 57.283),
    Block("1b", "bf16", "fused", 6.0, 7_808, 12, 74.38, 5.042),
    Block("1b", "bf16", "fused", None, 15_579, 0, 87.14, 15.049),
    Block("1b", "fp8", "fused", None, 15_510, 0, 86.1, 14.195),
    Block("1b", "8bit", "fused", None, 15_510, 0, 87.9, 14.196),
    Block("1b", "4bit", "fused", None, 15_510, 0, 88.0, 13.753),
    Block("8b", "4bit", "fused", 10.3, 5_248, 29, 14.65, 9.509, card="h200", one_scratch=True),
    Block("8b", "bf16", "fused", 25.0, 2_624, 0, 19.04, 23.436, card="h200"),
    Block("8b", "bf16", "fused", None, 15_617, 0, 20.41, 57.249, card="h200"),
    Block("1b", "bf16", "fused", 6.0, 7_808, 12, 79.43, 5.025, card="h200"),
    Block("1b", "bf16", "fused", None, 15_579, 0, 100.55, 15.007, card="h200"),
    Block("gemma3-4b", "bf16", "transformers", 20.0, 15_579, 34, 12.26, 13.194),
    Block("qwen3-1.7b", "bf16", "transformers", 10.0, 7_808, 28, 17.91, 5.308),
    Block("qwen3-8b", "4bit", "transformers", 10.3, 2_624, 36, 3.22, 8.054),
    Block("qwen3-8b", "bf16", "transformers", 26.0, 7_808, 36, 7.99, 19.663),
    Block("qwen3-8b", "4bit", "unsloth", 10.3, 2_624, 36, 4.72, 7.527),
    Block("qwen3-8b", "bf16", "unsloth", 26.0, 7_808, 36, 9.54, 17.386),
    _classic("8b", "bf16", "transformers", 25.0, 2, 32, 2.57, 18.021),
    _classic("1b", "bf16", "transformers", 6.0, 4, 16, 10.01, 4.531),
    _classic("1b", "bf16", "transformers", None, 8, 0, 11.80, 34.222),
    _classic("8b", "bf16", "transformers", 25.0, 2, 32, 3.07, 18.021, "h200"),
    _classic("1b", "bf16", "transformers", 6.0, 4, 16, 13.05, 4.530, "h200"),
    _classic("1b", "bf16", "transformers", None, 16, 0, 19.27, 65.845, "h200"),
    _classic("gemma3-4b", "bf16", "unsloth", 20.0, 8, 34, 5.86, 12.481),
    _classic("qwen3-1.7b", "bf16", "unsloth", 10.0, 8, 28, 13.64, 5.596),
    _classic("qwen3-8b", "4bit", "unsloth", 10.3, 4, 36, 4.17, 8.610),
    _classic("qwen3-8b", "bf16", "unsloth", 26.0, 8, 36, 4.34, 20.279),
    _classic("8b", "4bit", "unsloth", 10.3, 4, 32, 4.37, 8.216),
    _classic("8b", "bf16", "unsloth", 25.0, 8, 32, 4.46, 19.915),
    _classic("1b", "bf16", "unsloth", 6.0, 8, 16, 21.48, 4.883),
    _classic("1b", "bf16", "unsloth", None, 16, 0, 29.05, 36.449),
    _classic("8b", "4bit", "unsloth", 10.3, 4, 32, 4.71, 8.341, "h200"),
    _classic("8b", "bf16", "unsloth", 25.0, 8, 32, 4.66, 20.165, "h200"),
    _classic("1b", "bf16", "unsloth", 6.0, 8, 16, 24.54, 4.883, "h200"),
    _classic("1b", "bf16", "unsloth", None, 16, 0, 32.62, 36.449, "h200"),
    Block("qwen3-8b", "4bit", "fused", 10.3, 5_248, 35, 14.20, 9.44, card="h200"),
    Block("qwen3-8b", "bf16", "fused", 26.0, 2_624, 0, 18.05, 24.10, card="h200"),
    Block("qwen3-1.7b", "bf16", "fused", 10.0, 7_872, 15, 57.7, 8.71, card="h200"),
    Block("gemma3-4b", "bf16", "fused", 20.0, 3_968, 0, 28.7, 17.73, card="h200"),
    Block("gemma3-4b", "bf16", "fused", 20.0, 5_248, 9, 30.6, 18.21, card="h200"),
    _classic("gemma3-4b", "bf16", "unsloth", 20.0, 8, 34, 6.24, 12.48, "h200"),
    Block("phi4-mini", "bf16", "fused", 18.0, 5_248, 5, 33.49, 16.53, card="h200"),
    Block("olmo3-7b", "bf16", "fused", 26.0, 2_624, 0, 19.26, 23.02, card="h200"),
    Block("smollm3-3b", "bf16", "fused", 14.0, 5_248, 17, 35.80, 12.76, card="h200"),
    Block("ministral3-8b", "bf16", "fused", 26.0, 2_624, 2, 17.99, 24.40, card="h200"),
    _classic("phi4-mini", "bf16", "unsloth", 18.0, 8, 32, 6.89, 11.94, "h200"),
    _classic("smollm3-3b", "bf16", "unsloth", 14.0, 8, 36, 7.19, 10.96, "h200"),
    _classic("ministral3-8b", "bf16", "unsloth", 26.0, 8, 34, 3.64, 23.34, "h200"),
    _classic("qwen3-8b", "4bit", "unsloth", 10.3, 4, 36, 4.44, 8.49, "h200"),
    _classic("qwen3-8b", "bf16", "unsloth", 26.0, 8, 36, 4.50, 20.04, "h200"),
    _classic("qwen3-1.7b", "bf16", "unsloth", 10.0, 8, 28, 16.45, 5.60, "h200"),
    _long(1_024, 1_713.9, 1_943.9, 45.50, 25.601),
    _long(1_024, 1_445.4, 1_943.9, 56.39, 22.185),
    _long(1_024, 1_196.1, 1_943.9, 65.64, 19.017),
    _long(1_024, 1_037.3, 1_943.9, 80.40, 16.994),
    _long(4_096, 6_854.8, 7_776.1, 10.15, 25.753),
    _long(4_096, 5_803.4, 7_805.3, 12.06, 22.484),
    _long(4_096, 4_780.3, 7_778.4, 15.36, 26.426),
    _long(4_096, 4_144.3, 7_778.4, 18.73, 29.693),
    _long(8_192, 13_798.3, 15_645.7, 4.07, 26.012),
    _long(8_192, 11_606.9, 15_610.6, 4.87, 22.546),
    _long(8_192, 9_606.3, 15_605.1, 6.05, 26.839),
    _long(8_192, 8_308.9, 15_578.6, 7.47, 29.478),
)
