"""Transformers' own layers on packed batches: everything but attention runs on the stream as it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.attention import NAME, Tables, attend_packed, pads_attention
from dpo_assets.training.engines.base import Engine, OwnLayersEngine, attach_engine, attached_engine
from dpo_assets.training.engines.recurrent.mixers import serve_packed
from dpo_assets.training.engines.routers import RouterWatch
from dpo_assets.training.models.structure import causal_lm, decoder_of, description_of


class TransformersEngine(OwnLayersEngine):
    """The model's decoder, its attention on the packed stream (`engines.attention`), its states kept apart
    (`engines.recurrent`)."""

    name = "transformers"
    attention = NAME

    def __init__(self, lm: Any, *, compiled: bool = False) -> None:
        super().__init__(lm, compiled=compiled)
        self._watch: RouterWatch | None = None
        serve_packed(lm)

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> Tensor:
        decoder = decoder_of(self._lm)
        assert decoder is not None
        asked = {} if self._watch is None else {"output_router_logits": True}
        with autocast or nullcontext():
            said = decoder(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                packed=Tables(batch),
                **asked,
            )
            if self._watch is not None:
                self._watch.take(getattr(said, "router_logits", None))
            states: Tensor = said.last_hidden_state[0]
            return states.index_select(0, batch.scored.predict)

    @property
    def pads_attention(self) -> bool:
        """See `Engine`."""
        lm = self._lm
        return pads_attention(lm.config.get_text_config(), description_of(lm), lm.device, lm.dtype)

    @contextmanager
    def watching_routers(self) -> Iterator[RouterWatch]:
        """Around one forward; see `Engine`."""
        self._watch = RouterWatch(self._lm)
        try:
            yield self._watch
        finally:
            self._watch = None


def why_not_packed(lm: Any) -> str:
    """Puts the packed attention into a model's layers. Returns why they take none, empty when they do.

    Whether what they compute is exact then, only `scoring.proof` knows: a layer may leave to its mask what it does not
    tell its attention, or not hand it the packed batch.
    """
    decoder = decoder_of(lm)
    if decoder is None:
        return f"{type(lm).__name__} does not say which of its modules is the decoder"
    taken = inspect.signature(decoder.forward).parameters
    if "position_ids" not in taken or not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return f"{type(decoder).__name__} takes no positions and no tables of a packed batch"
    return "" if attend_packed(lm) else f"{type(lm).__name__} computes attention in a way of its own"


def engine_of(model: Any) -> Engine:
    """The engine that computes a model: the attached one, or its own layers, which are attached by that.

    Raises:
        ConfigError: when its layers take no packed batch.
    """
    engine = attached_engine(model)
    if engine is None:
        lm = causal_lm(model)
        if reason := why_not_packed(lm):
            raise ConfigError(f"{reason}, so nothing computes packed batches with it; choose_kernels finds what does")
        engine = TransformersEngine(lm)
        attach_engine(model, engine)
    return engine
