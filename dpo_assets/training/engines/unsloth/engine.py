"""Unsloth's own forward and kernels as an engine: a table of shared prefixes makes it compute packed batches."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.training.batches.batch import Layout, PackedBatch
from dpo_assets.training.engines.base import PlainEngine
from dpo_assets.training.engines.unsloth import NAME, computes
from dpo_assets.training.private.unsloth import TABLE, has_own_attention, shared_prefix_table

ATTENTION_BLOCK = 128  # Of FlexAttention's block mask, and a multiple of Unsloth's kernel's own blocks.


@contextmanager
def reference_mode(model: Any, kernels: str) -> Iterator[str]:
    """Puts the model into the mode whose forward is the policy's, and names that forward.

    Unsloth has two forwards that round differently, one compiled by whole blocks and one eager, and chooses by training
    mode, gradients and checkpointing. Measured on an H200 (1B Llama, bf16, 8 rows of 700 tokens without padding, the
    adapter at zero), as nats from an fp32 forward, summed over a row:

                            train, gradients   train, no_grad   eval
        no checkpointing         -0.43             -0.00        -0.43
        "unsloth" checkpointing  -0.00             -0.00        -0.43

    Each is as exact as bf16 gets; mixing them moved the first loss by 0.011. Packed batches go through blocks that stay
    uncompiled, and there all modes agreed (SmolLM2-135M on an H100, within 0.0001 nats a row, no checkpointing). The
    policy is in training mode and records gradients, so whatever is compared with it does the same
    (`Engine.as_the_policy`); what is recorded is thrown away.

    Yields:
        A name of the forward for the key of a reference cache: scores of two names must not meet in one run.
    """
    path = kernels
    if computes(kernels):
        path = f"{NAME} {importlib.metadata.version(NAME)}, the policy's forward"
    was_training = model.training
    model.train()
    try:
        with torch.no_grad():
            yield path
    finally:
        model.train(was_training)


def unsloth_packed_hidden(lm: Any, batch: PackedBatch) -> Tensor:
    """Last hidden states [T, h] of a packed batch (packing.pack) on Unsloth's own forward and kernels.

    Unsloth's Llama, Mistral, Qwen2, Qwen3, Cohere and Granite forwards take a table of shared prefixes, made for its
    GRPO, and hand attention to FlexAttention with a block mask: a token sees its group's prompt and its own completion
    up to itself, which is what `attention.packed_rows` computes on gathered rows. The stream is already in that order.
    `max_length` does not cut the stream, and Unsloth leaves blocks uncompiled in this mode.

    Call it under the autocast of training; accelerate wraps only `model.forward`.

    Raises:
        ConfigError: for an architecture, or a way of loading (8-bit), whose attention would ignore the table.
    """
    check_shared_prefix(lm, max(batch.row_lengths))
    build = shared_prefix_table()
    groups, place = on_blocks(batch.groups)
    place = place.to(batch.ids.device)
    length = sum(prompt + sum(completions) for prompt, completions in groups)
    table, _ = build(groups, place.device)
    ids, pos = (told.new_zeros(length).index_copy(0, place, told)[None] for told in (batch.ids, batch.positions))
    hidden: Tensor = lm.get_decoder()(
        input_ids=ids, position_ids=pos, use_cache=False, **{TABLE: table}
    ).last_hidden_state[0]
    return hidden.index_select(0, place)


class UnslothEngine(PlainEngine):
    """Unsloth's own forward with a table of shared prefixes. Call `check_shared_prefix` first."""

    name = NAME
    has_eager = False  # Its table of shared prefixes is checked at loading instead.

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    def hidden(self, batch: PackedBatch, autocast: AbstractContextManager[Any] | None) -> Tensor:
        with autocast or nullcontext():
            return unsloth_packed_hidden(self._lm, batch).index_select(0, batch.scored.predict)

    def as_the_policy(self) -> AbstractContextManager[Any]:
        """Its forwards with and without gradients round differently (`reference_mode`)."""
        recorded: AbstractContextManager[Any] = torch.enable_grad()
        return recorded


def on_blocks(groups: Layout) -> tuple[Layout, Tensor]:
    """The groups with filler between them, so that each begins on a block of attention; and where each token went [T].

    FlexAttention adds up a row block by block, so its rounding depends on where blocks cut the row. With every group at
    the beginning of one, a pair's score does not depend on what it is packed with: SmolLM2-135M in bf16 on an H100
    had margins 0.6 nats apart (root of the mean square) between two packings, and a first loss off by 0.015. Filler is
    a group of its own that nothing attends to.
    """
    laid: Layout = []
    places: list[Tensor] = []
    at = 0
    for prompt, completions in groups:
        if filler := -at % ATTENTION_BLOCK:
            laid.append((filler, []))
            at += filler
        size = prompt + sum(completions)
        laid.append((prompt, completions))
        places.append(torch.arange(at, at + size))
        at += size
    return laid, torch.cat(places)


def check_shared_prefix(lm: Any, longest_row: int) -> None:
    """Refuses a model whose attention would not see the table of shared prefixes, or not keep its own rules with it.

    Raises:
        ConfigError: with the reason and the way out.
    """
    config = lm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    reason = ""
    if not has_own_attention(lm):
        reason = "is not on Unsloth's own forward (8-bit models never are)"
    elif getattr(config, "attn_logit_softcapping", None):
        reason = "caps its attention logits, which Unsloth's shared-prefix attention leaves out"
    elif window is not None and window < longest_row:
        reason = f"attends within {window} tokens, which Unsloth's shared-prefix attention leaves out"
    if reason:
        raise ConfigError(
            f"{type(lm).__name__} {reason}, so the packed trainer cannot use Unsloth's kernels here. Set "
            "hardware.kernels to `auto`, or dpo.trainer to `trl`."
        )
