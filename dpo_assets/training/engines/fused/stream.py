"""A packed batch on its way through fused layers, with what its positions say computed once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dpo_assets.planning.decoder import QueryGrowth, Rope
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.fused.ops import Angles


@dataclass(frozen=True)
class Stream:
    """Of T tokens on the device.

    Attributes:
        angles: rotary tables of each kind of rotation in the decoder.
        growth: fp32 [T], what queries are multiplied by, of each kind.
    """

    batch: PackedBatch
    angles: Mapping[Rope, Angles]
    growth: Mapping[QueryGrowth, Tensor]
