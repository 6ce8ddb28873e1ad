"""Scores and gradients of a tiny policy twice: packed by its engine, and row by row by the model's eager forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.attention import plain_attention
from dpo_assets.training.engines.base import attach_engine
from dpo_assets.training.engines.transformers import TransformersEngine
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.scoring.logprobs import score_tokens, sequence_logps
from dpo_assets_tests.training.tiny_models import tiny_model

Gradients = dict[str, Tensor]
TOLERANCE = 1e-4


def tiny_policy(name: str, *, targets: Sequence[str] | str = "all-linear", **changes: Any) -> Any:
    """A tiny model on the Transformers engine, with an adapter that is not at zero.

    Args:
        changes: of its configuration. `target_parameters` goes to its adapter.
    """
    experts = changes.pop("target_parameters", None)
    attention.register()
    lm = tiny_model(name, **changes)
    lm.set_attn_implementation(attention.NAME)
    modules = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=modules, target_parameters=experts, task_type="CAUSAL_LM", bias="none"
    )
    policy = get_peft_model(lm, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in policy.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.2, generator=generator)
    attach_engine(policy, TransformersEngine(lm))
    return policy.eval()


def packed(policy: Any, groups: Sequence[Group], weights: Tensor) -> tuple[Tensor, Gradients]:
    """Scores of every completion [R], and the gradients of their weighted sum."""
    batch = pack(groups)
    scores = sequence_logps(score_tokens(policy, batch), batch)
    return scores.detach(), _gradients(policy, (scores * weights).sum())


def row_by_row(policy: Any, groups: Sequence[Group], weights: Tensor) -> tuple[Tensor, Gradients]:
    """The same from one forward a row."""
    lm = causal_lm(policy)
    with plain_attention(policy, "eager"):
        scores = torch.stack([_score(lm, group.prompt, c) for group in groups for c in group.completions])
        return scores.detach(), _gradients(policy, (scores * weights).sum())


def assert_equal(ours: tuple[Tensor, Gradients], theirs: tuple[Tensor, Gradients]) -> None:
    """Within TOLERANCE of the largest: a gradient that is small by cancellation is rounded as what it is made of."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert ours[1].keys() == theirs[1].keys()
    assert ours[1]
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        scale = max(float(gradient.abs().max()), 0.01 * largest)
        assert float((ours[1][name] - gradient).abs().max()) <= TOLERANCE * scale, name


def _score(lm: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    row = torch.tensor([[*prompt, *completion]])
    logits = lm(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None]).sum()


def _gradients(policy: Any, loss: Tensor) -> Gradients:
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
