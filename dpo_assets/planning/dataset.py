"""What planning needs to know of the pairs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DatasetStats(BaseModel):
    """Counts and lengths of a prepared dataset. Lengths are tokens after truncation."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    train_pairs: int
    eval_pairs: int
    max_length: int
    longest_pair: int = Field(description="Tokens of the longest pair with its prompt shared.")
    mean_pair: float = Field(description="Mean tokens of a pair with its prompt shared.")
    mean_prompt: float | None = Field(default=None, description="Mean tokens of a prompt; None: not counted.")

    def cut_to(self, max_length: int) -> DatasetStats:
        """An upper bound of the same statistics at a shorter `max_length`: a pair has two rows of at most that."""
        return self.model_copy(
            update={
                "max_length": max_length,
                "longest_pair": min(self.longest_pair, 2 * max_length),
                "mean_pair": min(self.mean_pair, 2.0 * max_length),
                "mean_prompt": None if self.mean_prompt is None else min(self.mean_prompt, float(max_length)),
            }
        )
