"""What an optimizer step holds, in tokens: by it forwards are sized and timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.shape import Kernels, Trainer
from dpo_assets.recipe import DpoSection

PROMPT_SHARE = 0.2  # Of a pair's tokens, where the dataset does not tell: UltraFeedback's (172 of 842).
# Mean square of a row's length over the square of its mean (UltraFeedback's lengths, cut at 1,024).
SQUARE_SPREAD = 1.25
ALIKE = 0.8  # Mean over longest pair from which pairs count as equally long.
SHORT_OF_MEAN = 0.97
CLASSIC_MICRO_BATCH = 2  # Pairs of a forward of TRL's trainer, as its users and Unsloth's know it.
# Filler of rows that are batched by like lengths, as a share of their tokens.
ROWS_FILLER = 0.15


@dataclass(frozen=True)
class Work:
    """An optimizer step.

    Attributes:
        pairs: pairs of a step.
        longest_pair: tokens of the longest pair with its prompt shared.
        mean_pair: mean tokens of a pair with its prompt shared.
        mean_prompt: mean tokens of a prompt.
        micro_batch: pairs of a forward of TRL's trainer; 0: its usual two.
    """

    pairs: int
    longest_pair: int
    mean_pair: float
    mean_prompt: float
    max_length: int
    trainer: Trainer = "packed"
    micro_batch: int = 0

    @classmethod
    def of(cls, data: DatasetStats, dpo: DpoSection) -> Work:
        prompt = PROMPT_SHARE * data.mean_pair if data.mean_prompt is None else data.mean_prompt
        return cls(
            dpo.batch_size, data.longest_pair, data.mean_pair, prompt, data.max_length, dpo.trainer,
            dpo.micro_batch_size or 0,
        )  # fmt: skip

    @property
    def step_tokens(self) -> float:
        """Mean tokens of a step, prompts shared."""
        return self.pairs * self.mean_pair

    @property
    def answer_tokens(self) -> float:
        """Mean scored tokens of a step."""
        return self.pairs * (self.mean_pair - self.mean_prompt)

    @property
    def mean_row(self) -> float:
        """Mean tokens of a prompt with one answer."""
        return (self.mean_pair + self.mean_prompt) / 2

    def whole_pairs(self, tokens: int) -> int:
        """What a forward of at most `tokens` really holds, where pairs are about equally long and few fit into it.

        A step is cut into forwards of equally many pairs, and a pair is never cut. Of a step's pairs some forward's are
        a little shorter than the mean, so that one more may fit.
        """
        if self.mean_pair < ALIKE * self.longest_pair or tokens < self.longest_pair:
            return tokens
        forwards = math.ceil(self.pairs / max(1, int(tokens / (SHORT_OF_MEAN * self.mean_pair))))
        return min(tokens, math.ceil(self.pairs / forwards) * self.longest_pair)

    def attended(self, window: int | None) -> float:
        """Pairs of tokens that causal attention looks at in a step, of the longest rows as a triangle, twice over."""
        squares = min(SQUARE_SPREAD * self.mean_row**2, float(self.max_length) ** 2)
        if window is not None and window < math.sqrt(squares):
            squares = 2 * math.sqrt(squares) * window - window**2
        return 2 * self.pairs * squares

    def micro_batches(self) -> tuple[int, ...]:
        """Pairs that a forward of TRL's trainer may hold, the most first; they divide the step."""
        if self.micro_batch:
            return (self.micro_batch,)
        return tuple(n for n in (CLASSIC_MICRO_BATCH, 1) if self.pairs % n == 0)

    def classic_tokens(self, micro_batch: int) -> int:
        """Most tokens of a forward of TRL's trainer, which pads every answer to the longest."""
        return 2 * micro_batch * self.max_length

    def computed_tokens(self, kernels: Kernels, budget: int) -> float:
        """Tokens that a step computes: filler counts."""
        if self.trainer == "trl":
            return 2 * self.pairs * self._padded_row(max(1, budget // (2 * self.max_length)))
        if kernels == "rows":
            return 2 * self.pairs * self.mean_row * (1 + ROWS_FILLER)
        return self.step_tokens

    def longest_forward(self, kernels: Kernels) -> int:
        """Tokens of the smallest forward that holds every pair: a padded pair is two rows of `max_length` at most."""
        return max(self.longest_pair, 2 * self.max_length) if kernels == "rows" else self.longest_pair

    def forwards(self, kernels: Kernels, budget: int) -> int:
        """Forwards that a step is cut into."""
        if self.trainer == "trl":
            return math.ceil(self.pairs / max(1, budget // (2 * self.max_length)))
        return max(1, math.ceil(self.computed_tokens(kernels, budget) / budget))

    def _padded_row(self, micro_batch: int) -> float:
        """Mean length that random rows of a micro-batch are padded to: the longest of n grows as ln n (1.59, 1.85 and
        1.95 times the mean at 4, 8 and 16 rows of UltraFeedback's lengths)."""
        return min(float(self.max_length), self.mean_row * (1 + 0.42 * math.log(2 * micro_batch)))
