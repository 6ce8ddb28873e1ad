"""The DPO family on sequence log-probabilities, as pure functions of log-ratios."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dpo_assets.errors import ConfigError


@dataclass(frozen=True)
class LogRatios:
    """log pi(y|x) - log pi_ref(y|x) of chosen and rejected answers, each [pairs], summed over tokens."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


def per_pair_loss(name: str, ratios: LogRatios, beta: float) -> Tensor:
    """Loss of each pair [pairs].

    `sigmoid` is equation 7 of Rafailov et al., arXiv 2305.18290: -log sigmoid(beta * margin).

    Raises:
        ConfigError: for a loss this version does not have; `loss_supported` says so before any training.
    """
    if name == "sigmoid":
        return -F.logsigmoid(beta * ratios.margin)
    raise ConfigError(f"loss `{name}` is not one of this version's losses: sigmoid")
