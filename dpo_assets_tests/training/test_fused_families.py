"""Each family on fused layers against its own eager forward, row by row: hidden states, scores, every LoRA gradient.

Models are tiny, random and in fp32; windows are shorter than rows; no norm, bias, sink or LoRA factor is left at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dpo_assets.planning.decoder import Decoder
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.base import attach_engine, causal_lm
from dpo_assets.training.engines.fused.decoder import FusedDecoder, why_not_fused
from dpo_assets.training.scoring.logprobs import score_tokens, sequence_logps
from dpo_assets_tests.training.tiny_models import OTHER_PAIR, PAIR, tiny_model

GROUPS = (PAIR, OTHER_PAIR, Group([7, 9], ([11],)))
FAMILIES = (
    "llama", "mistral+window", "ministral3", "qwen2", "qwen3", "phi3", "phi3+window", "smollm3", "granite", "olmo2",
    "olmo3", "gemma2", "gemma3_text", "glm4", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "qwen3_moe", "mixtral",
    "gpt_oss",
)  # fmt: skip
TOLERANCE = 1e-4
Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]


def adapted(name: str, targets: Sequence[str] | str = "all-linear", **changes: Any) -> Any:
    """A tiny model of a family with a random adapter."""
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_model(name, **changes),
        LoraConfig(r=3, lora_alpha=6, target_modules=targets if isinstance(targets, str) else list(targets),
                   task_type="CAUSAL_LM"),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_of(logps: Tensor) -> Tensor:
    """DPO's on the pairs, and more weight on the last row so that no gradient cancels."""
    return -torch.nn.functional.logsigmoid(0.1 * (logps[0:4:2] - logps[1:4:2])).sum() - 0.05 * logps[4]


def own(model: Any) -> Outcome:
    """(hidden states behind the scored tokens, scores, gradients) by the model's own forward, one row at a time."""
    lm = causal_lm(model)
    model.zero_grad()
    hidden, logps = [], []
    for group in GROUPS:
        for completion in group.completions:
            row = torch.tensor([[*group.prompt, *completion]])
            out = lm(input_ids=row, use_cache=False, output_hidden_states=True)
            scored = slice(len(group.prompt) - 1, -1)
            hidden.append(out.hidden_states[-1][0, scored].detach())
            wanted = row[0, len(group.prompt) :, None]
            logps.append(out.logits[0, scored].float().log_softmax(-1).gather(1, wanted).sum())
    loss_of(torch.stack(logps)).backward()
    return torch.cat(hidden), torch.stack(logps).detach(), gradients(model)


def fused(model: Any, recomputed: int = 0, description: Decoder | None = None) -> Outcome:
    """The same by fused layers, packed."""
    lm = causal_lm(model)
    assert why_not_fused(lm) == ""
    engine = FusedDecoder(lm, torch.float32, recomputed, description=description)
    attach_engine(lm, engine)
    model.zero_grad()
    batch = pack(GROUPS)
    logps = sequence_logps(score_tokens(model, batch), batch)
    loss_of(logps).backward()
    with torch.no_grad():
        return engine.hidden(batch), logps.detach(), gradients(model)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    for mine, exact in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, exact, atol=TOLERANCE, rtol=TOLERANCE)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        assert float(gradient.abs().max()) > 0, name
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            ours[2][name] / scale, gradient / scale, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_its_own_eager_forward(family: str) -> None:
    model = adapted(family)
    theirs = own(model)
    assert_same(fused(model), theirs)
