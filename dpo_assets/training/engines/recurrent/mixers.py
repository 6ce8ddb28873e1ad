"""Mixers that carry a state along the row, within Transformers' own decoder on a packed stream.

A mixer that is known (a delta net, a short convolution) runs along the segments. Any other gets its input gathered into
padded rows and runs its own forward: causal, so that what follows a row's end never reaches back. Everything around it
runs once a token of the stream. Mixers are found by their structure: a module that owns a causal depthwise convolution.
What carries a state without one is found by nothing here, and `scoring.proof` then takes another engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_assets.errors import ConfigError
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.engines.attention import Tables, unshare
from dpo_assets.training.engines.recurrent.delta_net import DeltaNet
from dpo_assets.training.engines.recurrent.short_conv import ShortConv
from dpo_assets.training.models.structure import decoder_layers

INPUT = "hidden_states"
# What a mixer may be told of a padded batch or of tokens before it; a packed batch has neither.
OF_OTHER_BATCHES = ("attention_mask", "cache_params", "past_key_values", "seq_idx")


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module owns a causal depthwise convolution, as every mixer with a state does that is in use."""
    return any(
        isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1 and child.kernel_size[0] > 1
        for child in module.children()
    )


def keep_adapters(lm: Any) -> None:
    """Lets every recurrent mixer of a language model train the adapters in it, on whatever batch.

    In training, mamba-ssm's kernel would take the output projection's weight and leave out its adapter.
    """
    for mixer in [module for module in lm.modules() if is_recurrent(module)]:
        if not isinstance(mixer.forward, _KeptAdapters | _PackedMixer):
            mixer.forward = _KeptAdapters(mixer)


class _KeptAdapters:
    """A mixer's own forward in evaluation mode, which is said to the mixer alone and not to the layers in it."""

    def __init__(self, mixer: nn.Module) -> None:
        self._own, self._mixer = mixer.forward, mixer

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        was_training = self._mixer.training
        self._mixer.training = False
        try:
            return self._own(*args, **kwargs)
        finally:
            self._mixer.training = was_training


def serve_packed(lm: Any) -> None:
    """Lets the recurrent mixers of a language model compute packed batches, whenever their layer is given one."""
    if not any(is_recurrent(module) for module in lm.modules()):
        return
    for layer in decoder_layers(lm)[1]:
        for mixer in [module for module in layer.modules() if is_recurrent(module)]:
            if not isinstance(mixer.forward, _PackedMixer):
                packed = _PackedMixer(mixer)
                # Layers are handed the batch, and not every layer hands it on to its mixer.
                layer.register_forward_pre_hook(packed.enter, with_kwargs=True)
                layer.register_forward_hook(packed.leave, always_call=True)
                mixer.forward = packed


class _PackedMixer:
    """A mixer's forward: its own, but for packed batches."""

    def __init__(self, mixer: nn.Module) -> None:
        self._own = mixer.forward if isinstance(mixer.forward, _KeptAdapters) else _KeptAdapters(mixer)
        self._name = type(mixer).__name__
        self._shared: Callable[[Tensor, PackedBatch], Tensor] | None = DeltaNet.of(mixer) or ShortConv.of(mixer)
        self._tables: Tables | None = None

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before its layer. A layer that is recomputed passes here again, with the batch that it was given."""
        self._tables = kwargs.get("packed")

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._tables = None

    # Its tables differ in every batch (see `attention.packed_rows`).
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._tables is None:
            return self._own(*args, **kwargs)
        batch = self._tables.batch
        if args:
            kwargs = kwargs | {INPUT: args[0]}
        stream = kwargs.pop(INPUT, None)
        if not isinstance(stream, Tensor):
            raise ConfigError(
                f"{self._name} carries a state and does not take its input as `{INPUT}`, so packed batches cannot be "
                "scored with it. Set hardware.kernels to `rows`, which computes row by row."
            )
        if self._shared is not None:
            return self._shared(stream[0], batch)[None]
        kwargs |= {name: None for name in OF_OTHER_BATCHES if name in kwargs}
        out = self._own(unshare(stream[0], batch.padded), **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        home: Tensor = first.flatten(0, 1).index_select(0, batch.padded.home)[None]
        return (home, *out[1:]) if isinstance(out, tuple) else home
