"""Model shapes, and the arithmetic that a DPO step cannot avoid. Pure Python: the coordinator imports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PEAK_FLOPS = 790e12  # Measured on one H200: an 8192 x 8192 x 8192 bf16 product on random data.
LORA_RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama shape, under the names of Transformers' LlamaConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def attention_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    def linears(self) -> list[tuple[int, int]]:
        """(output, input) width of the linear layers of one decoder layer."""
        wide, kv = self.attention_width, self.num_key_value_heads * self.head_dim
        h, i = self.hidden_size, self.intermediate_size
        return [(wide, h), (kv, h), (kv, h), (h, wide), (i, h), (i, h), (h, i)]

    @property
    def body_parameters(self) -> int:
        return self.num_hidden_layers * sum(rows * columns for rows, columns in self.linears())

    @property
    def adapter_parameters(self) -> int:
        return self.num_hidden_layers * LORA_RANK * sum(rows + columns for rows, columns in self.linears())

    @property
    def parameters(self) -> int:
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.body_parameters + embeddings

    def config(self) -> dict[str, Any]:
        """Arguments of LlamaConfig."""
        return asdict(self) | {
            "max_position_embeddings": 16_384,
            "rope_theta": 500_000.0,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 16, 8_192, True),
    "1b": Shape(2_048, 8_192, 16, 32, 8, 64, 128_256, True),
    "8b": Shape(4_096, 14_336, 32, 32, 8, 128, 128_256, False),
}


@dataclass(frozen=True)
class Work:
    """What a set of pairs holds, after truncation."""

    pairs: int
    unshared_tokens: int  # Tokens of all rows: the prompt counts once for each completion.
    shared_tokens: int  # Tokens of all pairs: the prompt counts once.
    completion_tokens: int
    squared_rows: int  # Sum of squared row lengths.


def work_of(rows: Sequence[dict[str, list[int]]], max_length: int) -> Work:
    """Counts the tokens of pairs that are cut to `max_length` from the start."""
    unshared = shared = completions = squared = 0
    for row in rows:
        prompt = len(row["prompt_ids"])
        answers = [min(len(row[key]), max_length - prompt) for key in ("chosen_ids", "rejected_ids")]
        lengths = [prompt + answer for answer in answers]
        unshared += sum(lengths)
        shared += prompt + sum(answers)
        completions += sum(answers)
        squared += sum(length**2 for length in lengths)
    return Work(len(rows), unshared, shared, completions, squared)


def policy_flops(shape: Shape, work: Work) -> float:
    """Fewest floating-point operations of the policy's forward and backward pass over these pairs.

    Per token of the shared stream: the frozen linears forward and the gradient of their inputs (4 P), and LoRA with the
    gradient of its weights (6 P_lora). Per scored token the head three times: forward, once more in the backward pass
    because its logits are not kept, and the gradient of its input. Causal attention: 2 d l^2 a row and layer forward,
    2.5 times that backward. Recomputing layers is not counted: it buys memory, and is no part of the method.
    """
    layers = (4 * shape.body_parameters + 6 * shape.adapter_parameters) * work.shared_tokens
    head = 3 * 2 * shape.hidden_size * shape.vocab_size * work.completion_tokens
    attention = 3.5 * 2 * shape.attention_width * work.squared_rows * shape.num_hidden_layers
    return float(layers + head + attention)


def limit_pairs_per_s(shape: Shape, work: Work) -> float:
    """Pairs a second of a device that computes at PEAK_FLOPS and does nothing else."""
    return work.pairs * PEAK_FLOPS / policy_flops(shape, work)
