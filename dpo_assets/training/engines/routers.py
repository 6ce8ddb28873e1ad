"""How evenly routers of a mixture of experts spread tokens: the balancing loss of Switch Transformers.

Fedus et al., arXiv 2101.03961, equations 4 to 6, in the form of Transformers and TRL: over all layers together, with k
choices a token. For N experts, f_i the choices of expert i a token, P_i its mean probability, it is N sum_i f_i P_i,
which is k where all are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_assets.errors import ConfigError


def balancing_loss(logits: Sequence[Tensor], choices: int) -> Tensor:
    """The balancing loss of router logits [tokens, experts], a layer each, in fp32; its gradient is that of P alone."""
    experts = logits[0].shape[-1]
    chosen = torch.zeros(experts, device=logits[0].device)
    probability = torch.zeros_like(chosen)
    for layer in logits:
        weights = layer.float().softmax(dim=-1)
        index = weights.detach().topk(choices, dim=-1).indices
        chosen = chosen + torch.zeros_like(weights).scatter_(1, index, 1.0).sum(dim=0)
        probability = probability + weights.sum(dim=0)
    tokens = sum(len(layer) for layer in logits)
    return experts * (chosen / tokens * (probability / tokens)).sum()


class RouterWatch:
    """What the routers of a model said in one forward on a packed batch: of each token of the stream once."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._logits: tuple[Tensor, ...] = ()

    def take(self, logits: tuple[Tensor, ...] | None) -> None:
        """Router logits [tokens, experts] of each layer that has experts.

        Raises:
            ConfigError: for a model that returns none.
        """
        if not logits:
            raise ConfigError(
                f"router_balance is set, and {type(self._lm).__name__} returns no router logits that it could be of. "
                "Set sft.router_balance and dpo.router_balance to 0."
            )
        self._logits = logits

    def loss(self) -> Tensor:
        """Their balancing loss.

        Raises:
            ConfigError: for a model whose config does not say how many experts a token has.
        """
        config = self._lm.config.get_text_config()
        stated = [getattr(config, name, None) for name in ("num_experts_per_tok", "top_k_experts")]  # Gemma 4
        stated.append(getattr(getattr(config, "ffn_config", None), "moe_top_k", None))  # DBRX
        choices = next((number for number in stated if number), None)
        if choices is None:
            raise ConfigError(
                f"router_balance is set, and the config of {type(self._lm).__name__} does not say how many experts a "
                "token has. Set sft.router_balance and dpo.router_balance to 0."
            )
        return balancing_loss(self._logits, int(choices))
