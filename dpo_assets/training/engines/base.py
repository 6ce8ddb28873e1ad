"""The interface of everything that computes a causal language model: one engine a model, kept in one place.

An engine travels with the model that it computes, because the trainers of TRL and Transformers hand on the model alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.head import Head, TokenScores, score_hidden
from dpo_assets.training.engines.recurrent.mixers import keep_adapters
from dpo_assets.training.engines.routers import RouterWatch
from dpo_assets.training.models.structure import causal_lm

ATTRIBUTE = "dpo_assets_engine"


class Engine(Protocol):
    """What computes a causal language model on packed batches."""

    @property
    def name(self) -> str:
        """As the plan and the reports call it (`hardware.kernels`)."""

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> Tensor:
        """Hidden states [N, hidden] behind the batch's scored tokens, after the last norm; with gradient where asked.

        Args:
            batch: `packing.pack`'s, on the model's device.
            autocast: that of training. Engines call the decoder themselves, past the wrapper that accelerate puts
                around `model.forward`.
        """

    def scores(self, lm: Any, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> TokenScores:
        """What is made of them by the head of `lm`, a scored token each."""

    def renew(self) -> None:
        """To be called when the adapter may have been trained since its last use: before a step, before scoring."""

    def as_the_policy(self) -> AbstractContextManager[Any]:
        """Around a forward that will be compared with the policy's, where gradients decide which graph is taken."""

    def watching_routers(self) -> AbstractContextManager[RouterWatch]:
        """Around one forward, whose routers will be asked how evenly they spread its tokens.

        Raises:
            ConfigError: by engines that do not hear what routers say.
        """

    @property
    def has_eager(self) -> bool:
        """Whether the model's own eager attention can be asked beside it, to prove that it is exact."""

    @property
    def padded(self) -> bool:
        """Whether every row is computed whole and padded, so that a forward costs its rows times the widest."""

    @property
    def pads_attention(self) -> bool:
        """Whether a layer's attention runs on padded rows, so that groups of like length belong together."""

    @property
    def attention(self) -> str | None:
        """The attention of Transformers that the model's layers must be on; None: their own, or no matter."""


class PlainEngine:
    """What most engines say of themselves."""

    has_eager = True
    name = ""
    padded = False
    attention: str | None = None

    @property
    def pads_attention(self) -> bool:
        """Attention of its own, on rows of any length."""
        return False

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> Tensor:
        """See `Engine`."""
        raise NotImplementedError

    def scores(self, lm: Any, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> TokenScores:
        """By this project's head, which never holds all logits."""
        return score_hidden(self.hidden(batch, autocast), Head.of(lm), batch)

    def renew(self) -> None:
        """Reads the adapter's own parameters at every use."""

    def as_the_policy(self) -> AbstractContextManager[Any]:
        """One graph, with or without gradients."""
        return nullcontext()

    def watching_routers(self) -> AbstractContextManager[RouterWatch]:
        """Hears nothing of them."""
        raise ConfigError(
            f"router_balance is set, and kernels `{self.name}` do not tell what routers say; set hardware.kernels to "
            "`transformers`, or sft.router_balance and dpo.router_balance to 0"
        )


class OwnLayersEngine(PlainEngine):
    """The modules of a Transformers model, its adapter's layers among them.

    Args:
        compiled: whether its layers are compiled: a layer has one graph with gradients and one without then.
    """

    def __init__(self, lm: Any, *, compiled: bool = False) -> None:
        self._lm, self._compiled = lm, compiled
        keep_adapters(lm)

    def as_the_policy(self) -> AbstractContextManager[Any]:
        return torch.enable_grad() if self._compiled else nullcontext()


def attach_engine(model: Any, engine: Engine) -> None:
    """From now on `engine` computes this model, wrapped or not."""
    # Not by setattr, which would register an engine's modules as the model's own.
    object.__setattr__(causal_lm(model), ATTRIBUTE, engine)


def attached_engine(model: Any) -> Engine | None:
    """The engine that was attached to a model, if any was."""
    engine: Engine | None = getattr(causal_lm(model), ATTRIBUTE, None)
    return engine
