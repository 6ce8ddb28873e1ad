"""Private names of TRL. Read of 1.15.0."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from torch import Tensor

from dpo_assets.training.private.library import Library

TRL = Library("trl", "1.15.0", "pip install -c constraints.txt trl", since=(1, 15), below=(1, 16))
REFERENCE_ADAPTER = "ref"  # The frozen copy of a starting adapter that DPOTrainer makes.
# What DPOTrainer's batches hold beside a model's inputs.
NOT_MODEL_INPUTS = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})


@cache
def check_hooks() -> None:
    """That DPOTrainer still has the methods that trainers here override: `_prepare_dataset`, through which every
    dataset goes that it is given, and `_compute_loss(model, inputs, return_outputs)`, which computes a batch's loss."""
    TRL.check_version("what DPOTrainer calls its own methods for")
    TRL.find("trl", "DPOTrainer._prepare_dataset")
    loss = TRL.find("trl", "DPOTrainer._compute_loss")
    TRL.check_call("DPOTrainer._compute_loss", loss, ("self", "model", "inputs", "return_outputs"))


def check_adapters(trainer: Any, before: Collection[str]) -> None:
    """That a trainer added no adapter to those that its model had but the copy that is known here: another would be
    kept in memory, and saved.

    Raises:
        ConfigError: naming it.
    """
    added = set(getattr(trainer.model, "peft_config", {})) - {*before, REFERENCE_ADAPTER}
    if added:
        raise TRL.refused(f"makes an adapter {', '.join(sorted(added))} of its own")


def check_prepared(trainer: Any, called: bool) -> None:
    """That a trainer's rows went through its `_prepare_dataset`.

    Args:
        called: whether it was.

    Raises:
        ConfigError: when they were prepared by another method.
    """
    if trainer.train_dataset is not None and not called:
        raise TRL.refused("prepares a dataset elsewhere than in DPOTrainer._prepare_dataset")


@cache
def _use_adapter() -> Callable[..., AbstractContextManager[None]]:
    made: Callable[..., AbstractContextManager[None]] = TRL.find("trl.trainer.utils", "use_adapter")
    TRL.check_call("use_adapter", made, ("model", "adapter_name"))
    return made


def using_adapter(model: Any, name: str | None) -> AbstractContextManager[None]:
    """`trl.trainer.utils.use_adapter`: another adapter for a while, or none."""
    return _use_adapter()(model, name)


def reference_in_batch(trainer: Any) -> None:
    """`DPOTrainer.precompute_ref_logps`: from now on `_compute_loss` reads `ref_chosen_logps` and `ref_rejected_logps`
    from the batch."""
    TRL.check_has("DPOTrainer", trainer, ("precompute_ref_logps",))
    trainer.precompute_ref_logps = True


def token_logps(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """[rows, tokens - 1] log-probabilities of the labels by the head that DPOTrainer put into its model
    (`fused_lm_head=True`, which returns `log_probs`); 0 where a label is -100."""
    outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
    try:
        logps: Tensor = outputs.log_probs
    except AttributeError:
        raise TRL.refused("returns no log_probs from a model with fused_lm_head=True") from None
    return logps


def check_balance(trainer: Any) -> None:
    """That a trainer has what `last_balance` reads.

    Raises:
        ConfigError: when it has not.
    """
    TRL.check_has("DPOTrainer", trainer, ("aux_loss_enabled", "router_aux_loss_coef", "_metrics"))


def last_balance(trainer: Any) -> float:
    """What the routers' balancing loss added to the last loss of training: `DPOTrainer._metrics["train"]["aux_loss"]`
    times `router_aux_loss_coef`; 0 where `aux_loss_enabled` is not set."""
    if not trainer.aux_loss_enabled:
        return 0.0
    return float(trainer.router_aux_loss_coef * trainer._metrics["train"]["aux_loss"][-1])
