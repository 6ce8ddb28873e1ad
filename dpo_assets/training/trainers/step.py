"""One optimizer step as data: the packed forwards that a batch of rows is cut into, with what is known of their pairs.

What crosses the data loader and accelerate is a mapping with the step in it, because transformers' loop looks for names
in whatever a collator returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.batches.batch import PackedBatch, Tensors
from dpo_assets.training.batches.packing import Group, balanced, by_rows, by_width, pack
from dpo_assets.training.engines.transformers import engine_of

STEP = "step"
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, eq=False)
class Coupled(Tensors):
    """A forward's part of a loss that couples the pairs of all forwards of a step, known before any is differentiated.

    Attributes:
        slopes: [pairs, 2] derivatives of the step's loss by the log-probabilities of chosen and rejected.
        share: [] what it counts for in the step's loss.
    """

    slopes: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class Forward(Tensors):
    """A packed batch, and what is known of its pairs beforehand.

    Attributes:
        reference: [pairs, 2] summed log-probabilities of chosen and rejected by the reference.
    """

    batch: PackedBatch
    reference: Tensor | None = None
    coupled: Coupled | None = None


@dataclass(frozen=True, eq=False)
class Step(Tensors):
    """The forwards of one optimizer step.

    Attributes:
        pairs: rows of the dataset.
        targets: scored tokens.
        first_targets: those of the first completions.
    """

    forwards: tuple[Forward, ...]
    pairs: int
    targets: int
    first_targets: int

    @property
    def tokens(self) -> int:
        """Tokens of all streams: a shared prompt's count once."""
        return sum(len(forward.batch.ids) for forward in self.forwards)


class PackedCollator:
    """Rows of a prepared dataset to one step.

    Args:
        referenced: the rows have the reference's log-probabilities, in REFERENCE_COLUMNS.
        padded: attention will run on padded rows, so pairs of like length belong together; otherwise forwards are
            about equally large.
        whole_rows: all of the model will, so a forward costs its rows times the widest.
    """

    def __init__(
        self,
        to_group: Callable[[dict[str, Any]], Group],
        budget: int,
        *,
        referenced: bool = False,
        padded: bool = False,
        whole_rows: bool = False,
    ) -> None:
        self.to_group, self.budget, self.referenced = to_group, budget, referenced
        self.padded, self.whole_rows = padded, whole_rows

    @classmethod
    def of(
        cls, model: Any, to_group: Callable[[dict[str, Any]], Group], budget: int, *, referenced: bool = False
    ) -> PackedCollator:
        """Cuts a batch as the engine that computes `model` pays for it."""
        engine = engine_of(model)
        return cls(to_group, budget, referenced=referenced, padded=engine.pads_attention, whole_rows=engine.padded)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Step]:
        return {STEP: self.step(rows)}

    def step(self, rows: list[dict[str, Any]]) -> Step:
        """What these rows are as a step, on the CPU."""
        groups = [self.to_group(row) for row in rows]
        both, sizes = list(zip(groups, rows, strict=True)), [g.tokens for g in groups]
        widths = [g.longest_row for g in groups]
        if self.whole_rows:
            runs = by_rows(both, widths, self.budget, len(groups[0].completions))
        elif self.padded:
            runs = by_width(both, sizes, widths, self.budget)
        else:
            runs = balanced(both, sizes, self.budget)
        return Step(
            forwards=tuple(
                Forward(pack([group for group, _ in run]), self._reference([row for _, row in run])) for run in runs
            ),
            pairs=len(rows),
            targets=sum(len(completion) for group in groups for completion in group.completions),
            first_targets=sum(len(group.completions[0]) for group in groups),
        )

    def _reference(self, rows: list[dict[str, Any]]) -> Tensor | None:
        return torch.tensor([[row[name] for name in REFERENCE_COLUMNS] for row in rows]) if self.referenced else None
