"""Transformers' own layers on packed batches: everything but attention runs on the stream as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dpo_assets.training.batches.packing import PackedBatch
from dpo_assets.training.engines.attention import Tables
from dpo_assets.training.engines.base import PlainEngine, attached_engine, causal_lm
from dpo_assets.training.engines.recurrent.mixers import serve_packed
from dpo_assets.training.scoring.routers import RouterWatch


class TransformersEngine(PlainEngine):
    """The model's decoder, its attention on gathered rows (`engines.attention`), its states kept apart (`recurrent`).

    Args:
        compiled: whether its layers are compiled: a layer has one graph with gradients and one without then.
    """

    name = "transformers"

    def __init__(self, lm: Any, *, compiled: bool = False) -> None:
        self._lm, self._compiled = lm, compiled
        self._watch: RouterWatch | None = None
        serve_packed(lm)

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> Tensor:
        asked = {} if self._watch is None else {"output_router_logits": True}
        with autocast or nullcontext():
            said = self._lm.get_decoder()(
                input_ids=batch["ids"][None],
                position_ids=batch["pos"][None],
                use_cache=False,
                packed=Tables(batch),
                **asked,
            )
            if self._watch is not None:
                self._watch.take(getattr(said, "router_logits", None))
            states: Tensor = said.last_hidden_state[0]
            return states.index_select(0, batch["predict"])

    @contextmanager
    def watching_routers(self) -> Iterator[RouterWatch]:
        """Around one forward; see `Engine`."""
        self._watch = RouterWatch(self._lm)
        try:
            yield self._watch
        finally:
            self._watch = None

    def as_the_policy(self) -> AbstractContextManager[Any]:
        return torch.enable_grad() if self._compiled else nullcontext()


def engine_of(model: Any) -> Any:
    """The engine that computes a model: the attached one, or its own layers."""
    return attached_engine(model) or TransformersEngine(causal_lm(model))
