"""The arithmetic that a DPO step of a model cannot avoid. Pure Python; `models.read_off` gets it from a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PEAK_FLOPS = 790e12  # Measured on one H200: an 8192 x 8192 x 8192 bf16 product on random data; one H100: 798e12.
ARITHMETIC_FILE = "arithmetic.json"


@dataclass(frozen=True)
class Arithmetic:
    """What a token costs in a model.

    Attributes:
        body: weights of the decoder layers that one token is multiplied with; of routed experts, the active ones.
        adapter: LoRA's weights.
        hidden: width of the head's input.
        vocabulary: width of its output.
        attentions: (width of all query heads, window) of each attention layer; None: attends to the whole row.
        states: key width times value width of all heads and layers that carry a state along the row.
    """

    body: int
    adapter: int
    hidden: int
    vocabulary: int
    attentions: tuple[tuple[int, int | None], ...]
    states: int = 0

    def write(self, folder: Path) -> None:
        (folder / ARITHMETIC_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_arithmetic(folder: Path) -> Arithmetic:
    """That of the model in a folder."""
    values = json.loads((folder / ARITHMETIC_FILE).read_text(encoding="utf-8"))
    return Arithmetic(**values | {"attentions": tuple((width, window) for width, window in values["attentions"])})


@dataclass(frozen=True)
class Work:
    """What a set of pairs holds, after truncation."""

    pairs: int
    shared_tokens: int  # Tokens of all pairs: the prompt counts once.
    completion_tokens: int
    row_lengths: tuple[int, ...]  # Two rows a pair: the prompt counts once for each completion.

    @property
    def unshared_tokens(self) -> int:
        return sum(self.row_lengths)

    def attended(self, window: int | None) -> int:
        """Twice the number of (query, key) pairs that causal attention looks at: l^2 a row, 2 w l - w^2 in a window."""
        return sum(
            length**2 if window is None or length <= window else 2 * window * length - window**2
            for length in self.row_lengths
        )


def work_of(rows: Sequence[dict[str, list[int]]], max_length: int) -> Work:
    """Counts the tokens of pairs that are cut to `max_length` from the start."""
    shared = completions = 0
    lengths: list[int] = []
    for row in rows:
        prompt = len(row["prompt_ids"])
        answers = [min(len(row[key]), max_length - prompt) for key in ("chosen_ids", "rejected_ids")]
        lengths += [prompt + answer for answer in answers]
        shared += prompt + sum(answers)
        completions += sum(answers)
    return Work(len(rows), shared, completions, tuple(lengths))


def policy_flops(model: Arithmetic, work: Work) -> float:
    """Fewest floating-point operations of the policy's forward and backward pass over these pairs.

    Per token of the shared stream: the frozen linears forward and the gradient of their inputs (4 P), and LoRA with the
    gradient of its weights (6 P_lora). Per scored token the head three times: forward, once more in the backward pass
    because its logits are not kept, and the gradient of its input. Causal attention: 2 d l^2 a row and layer forward,
    2.5 times that backward, in a window the part of it that is seen. A gated delta net (Yang et al., arXiv 2412.06464)
    multiplies each head's state three times a token, to read what a key holds, to write, and to answer the query; its
    backward pass costs twice that. Recomputing layers is not counted: it buys memory, and is no part of the method.
    """
    layers = (4 * model.body + 6 * model.adapter + 3 * 3 * 2 * model.states) * work.shared_tokens
    head = 3 * 2 * model.hidden * model.vocabulary * work.completion_tokens
    attention = 3.5 * 2 * sum(width * work.attended(window) for width, window in model.attentions)
    return float(layers + head + attention)


def limit_pairs_per_s(model: Arithmetic, work: Work) -> float:
    """Pairs a second of a device that computes at PEAK_FLOPS and does nothing else."""
    return work.pairs * PEAK_FLOPS / policy_flops(model, work)
