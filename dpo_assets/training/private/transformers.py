"""Private names of Transformers. Read of 5.17.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from torch import Tensor, nn

from dpo_assets.training.private.library import Library

TRANSFORMERS = Library("transformers", "5.17.0", "pip install -c constraints.txt transformers")
# What a base is told to be loaded in, on the model, by precision.
LOADED_IN = {"4bit": "is_loaded_in_4bit", "8bit": "is_loaded_in_8bit"}


class Registry(Protocol):
    """Implementations of a part of a layer by name."""

    def __getitem__(self, name: str) -> Callable[..., Any]: ...

    def register(self, name: str, function: Callable[..., Any]) -> None:
        """Makes one known to every model."""


@cache
def attention_functions() -> Registry:
    """`modeling_utils.ALL_ATTENTION_FUNCTIONS`, with an entry `sdpa` (module, query, key, value, attention_mask,
    scaling=, dropout=). `AttentionInterface`, which is documented, registers and does not give entries back."""
    registry: Registry = TRANSFORMERS.find("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")
    TRANSFORMERS.check_has("ALL_ATTENTION_FUNCTIONS", registry, ("register", "__getitem__"))
    tensors = ("module", "query", "key", "value", "attention_mask")
    TRANSFORMERS.check_call("the attention `sdpa`", registry["sdpa"], tensors, ("scaling", "dropout"), passes_on=True)
    return registry


@cache
def _check_attention_name() -> None:
    config = TRANSFORMERS.find("transformers", "PreTrainedConfig")
    TRANSFORMERS.check_has("PreTrainedConfig", config, ("_attn_implementation",))


def attention_of(lm: Any) -> str:
    """`config._attn_implementation`: the attention that a model's layers are on; `set_attn_implementation` only warns
    where they take none."""
    _check_attention_name()
    name: str = lm.config._attn_implementation
    return name


@cache
def experts_functions() -> Registry:
    """`integrations.moe.ALL_EXPERTS_FUNCTIONS`, with an entry `grouped_mm` (experts, hidden states, index, weights);
    and that the modules on it keep what `experts_forward` reads of them (`use_experts_implementation`)."""
    registry: Registry = TRANSFORMERS.find("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS")
    TRANSFORMERS.check_has("ALL_EXPERTS_FUNCTIONS", registry, ("register", "__getitem__"))
    tensors = ("self", "hidden_states", "top_k_index", "top_k_weights")
    TRANSFORMERS.check_call("the experts `grouped_mm`", registry["grouped_mm"], tensors)
    decorated = TRANSFORMERS.find("transformers.integrations.moe", "use_experts_implementation")
    made = decorated(type("Experts", (nn.Module,), {"forward": lambda self, x: x, "__init__": _empty_module}))
    TRANSFORMERS.check_has("experts", TRANSFORMERS.made("module of experts", lambda: made(None)), OF_EXPERTS)
    TRANSFORMERS.check_has("experts' forward", made.forward, ("__wrapped__",))
    return registry


def _empty_module(module: nn.Module, config: Any) -> None:
    nn.Module.__init__(module)


# What `use_experts_implementation` gives a module of stacked experts, beside the module's own `num_experts`.
OF_EXPERTS = ("is_transposed", "has_bias", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of stacked experts, whose implementation Transformers lets one choose."""
    return all(hasattr(module, name) for name in ("num_experts", *OF_EXPERTS))


def gated_by(experts: Any, gate_up: Tensor) -> Tensor:
    """`experts._apply_gate`: [S, inner] of the first product [S, 2 * inner], rows of each expert."""
    gated: Tensor = experts._apply_gate(gate_up)
    return gated


def own_experts_forward(experts: Any) -> Callable[..., Any]:
    """A module's own loop over experts, below the wrapper that chooses an implementation: `forward.__wrapped__`."""
    own: Callable[..., Any] = type(experts).forward.__wrapped__
    return own


@cache
def checkpointing_layer() -> type[nn.Module]:
    """`modeling_layers.GradientCheckpointingLayer`, whose attribute `gradient_checkpointing` decides layer by layer."""
    layer: type[nn.Module] = TRANSFORMERS.find("transformers.modeling_layers", "GradientCheckpointingLayer")
    TRANSFORMERS.check_has("GradientCheckpointingLayer", layer, ("gradient_checkpointing",))
    return layer


@cache
def chunk_gated_delta_rule() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Qwen3-Next's `torch_chunk_gated_delta_rule`: query, key, value [rows, tokens, heads, dim], `g` and `beta` [rows,
    tokens, heads], `initial_state`, `output_final_state` and `use_qk_l2norm_in_kernel` by name -> (out, state)."""
    name = "torch_chunk_gated_delta_rule"
    rule: Callable[..., Any] = TRANSFORMERS.find("transformers.models.qwen3_next.modeling_qwen3_next", name)
    state = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
    TRANSFORMERS.check_call(name, rule, ("query", "key", "value"), ("g", "beta", *state))
    return rule


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """`activations.ACT2FN`: the function that a configuration names."""
    function: Callable[[Tensor], Tensor] = _activations()[name]
    return function


@cache
def _activations() -> Any:
    known = TRANSFORMERS.find("transformers.activations", "ACT2FN")
    TRANSFORMERS.check_has("ACT2FN", known, ("__getitem__",))
    return known


def mark_schedule_made(trainer: Any) -> None:
    """`Trainer._created_lr_scheduler`: that another `train` makes a schedule of its own."""
    TRANSFORMERS.check_has("Trainer", trainer, ("_created_lr_scheduler",))
    trainer._created_lr_scheduler = True


@cache
def check_tied_weights() -> None:
    """`PreTrainedModel._tied_weights_keys`, which a class of this project sets: {tied: whose it is}, read by
    `get_expanded_tied_weights_keys` (Transformers 4 had a list)."""
    model = TRANSFORMERS.find("transformers", "PreTrainedModel")
    TRANSFORMERS.check_has("PreTrainedModel", model, ("_tied_weights_keys", "get_expanded_tied_weights_keys"))


def cannot_convert(error: RuntimeError) -> bool:
    """Whether loading failed because experts could not be joined into one tensor: `utils.loading_report` says so in its
    text alone. In other words it would be raised as it is, as any RuntimeError is."""
    return "conversion of the weights" in str(error)


@cache
def adjusting_unexpected() -> str:
    """`PreTrainedModel._adjust_missing_and_unexpected_keys` (loading_info), which takes out of `unexpected_keys` what a
    class ignores: its name."""
    model, name = TRANSFORMERS.find("transformers", "PreTrainedModel"), "_adjust_missing_and_unexpected_keys"
    TRANSFORMERS.check_has("PreTrainedModel", model, (name,))
    TRANSFORMERS.check_call(name, getattr(model, name), ("self", "loading_info"))
    info = TRANSFORMERS.find("transformers.modeling_utils", "LoadStateDictInfo")
    TRANSFORMERS.check_has("LoadStateDictInfo", info, ("__dataclass_fields__",))
    TRANSFORMERS.check_has("LoadStateDictInfo", type("Info", (), dict(info.__dataclass_fields__)), ("unexpected_keys",))
    return name


@contextmanager
def every_unexpected() -> Iterator[set[str]]:
    """Collects the names that `from_pretrained` has no place for in the model, those too that its class ignores.

    `unexpected_keys` lack these: buffers of earlier versions, and `mtp`. A release that was made without them would
    have lost them unseen.

    Yields:
        a set that is filled while a model is loaded.
    """
    model, name = TRANSFORMERS.find("transformers", "PreTrainedModel"), adjusting_unexpected()
    own = getattr(model, name)
    met: set[str] = set()

    def adjust(self: Any, loading_info: Any) -> None:
        met.update(loading_info.unexpected_keys)
        own(self, loading_info)

    setattr(model, name, adjust)
    try:
        yield met
    finally:
        setattr(model, name, own)


@dataclass(frozen=True)
class RunningLoss:
    """A Trainer's loss between two logs: `since_log` [] summed since step `logged_step`, and the `total` before it."""

    since_log: Tensor
    total: float
    logged_step: int


@cache
def check_running_loss() -> None:
    """`Trainer._tr_loss`, `_total_loss_scalar`, `_globalstep_last_logged`, which `_inner_training_loop` sets before the
    training begins and `_maybe_log_save_evaluate` reads; and `_load_from_checkpoint(resume_from_checkpoint, model)`,
    which loads a model alone."""
    trainer = TRANSFORMERS.find("transformers", "Trainer")
    for method, names in (
        ("_inner_training_loop", ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")),
        ("_maybe_log_save_evaluate", ("_total_loss_scalar", "_globalstep_last_logged")),
    ):
        TRANSFORMERS.check_has("Trainer", trainer, (method,))
        used = getattr(trainer, method).__code__.co_names
        if missing := [name for name in names if name not in used]:
            raise TRANSFORMERS.refused(f"has no {', '.join(missing)} in Trainer.{method}")
    name = "_load_from_checkpoint"
    TRANSFORMERS.check_has("Trainer", trainer, (name,))
    TRANSFORMERS.check_call(name, getattr(trainer, name), ("self", "resume_from_checkpoint", "model"))


def running_loss(trainer: Any) -> RunningLoss:
    """What a Trainer has summed since its last log."""
    check_running_loss()
    return RunningLoss(trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged)


def set_running_loss(trainer: Any, loss: RunningLoss) -> None:
    """Puts it back, in a training that has begun."""
    check_running_loss()
    trainer._tr_loss, trainer._total_loss_scalar = loss.since_log, loss.total
    trainer._globalstep_last_logged = loss.logged_step
