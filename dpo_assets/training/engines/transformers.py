"""Transformers' own layers on packed batches: everything but attention runs on the stream as it is."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from dpo_assets.training.batches.packing import PackedBatch
from dpo_assets.training.engines.attention import NAME, Tables, attend_packed
from dpo_assets.training.engines.base import OwnLayersEngine, attached_engine, causal_lm, decoder_of


class TransformersEngine(OwnLayersEngine):
    """The model's decoder, its attention on the packed stream (`engines.attention`)."""

    name = "transformers"
    attention = NAME

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> Tensor:
        decoder = decoder_of(self._lm)
        assert decoder is not None
        with autocast or nullcontext():
            states: Tensor = decoder(
                input_ids=batch["ids"][None], position_ids=batch["pos"][None], use_cache=False, packed=Tables(batch)
            ).last_hidden_state[0]
            return states.index_select(0, batch["predict"])


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


def engine_of(model: Any) -> Any:
    """The engine that computes a model: the attached one, or its own layers."""
    return attached_engine(model) or TransformersEngine(causal_lm(model))
