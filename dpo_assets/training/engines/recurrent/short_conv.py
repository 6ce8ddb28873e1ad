"""Gated short convolutions (LFM2) on the packed stream: an answer sees of its prompt the last tokens alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.recurrent.convolution import convolve, lead_of
from dpo_assets.training.engines.recurrent.segments import Segments


class ShortConv:
    """A short convolution's modules, computed on packed batches."""

    def __init__(self, mixer: Any) -> None:
        self._mixer = mixer

    @classmethod
    def of(cls, mixer: Any) -> ShortConv | None:
        """A module as a short convolution: in_proj to B, C and x, and nothing but `conv` between it and out_proj."""
        children = dict(mixer.named_children())
        if children.keys() != {"conv", "in_proj", "out_proj"} or not isinstance(children["conv"], nn.Conv1d):
            return None
        # A state of another kind would need parameters of its own.
        if any(True for _ in mixer.parameters(recurse=False)):
            return None
        return cls(mixer)

    def __call__(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Stream [T, hidden] to stream [T, hidden]."""
        mixer = self._mixer
        segments = Segments.of(batch, lead_of(mixer.conv))
        before, after, value = mixer.in_proj(x).chunk(3, dim=1)
        convolved = segments.streamed(convolve(before * value, mixer.conv, None, segments))
        out: Tensor = mixer.out_proj(after * convolved)
        return out
