"""The fused layers in 16 bit on a GPU: as close to fp32 as Transformers with PEFT in the same precision is.

Llama by Transformers' packed layers, other families by their own eager forward row by row, with windows that show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.fused.decoder import attach_fused
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.scoring.logprobs import score_tokens, sequence_logps
from dpo_assets_tests.training.test_fused import with_lora
from dpo_assets_tests.training.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model(dtype: torch.dtype) -> Any:
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation=attention.NAME,
    )  # fmt: skip
    return with_lora(LlamaForCausalLM(config).to("cuda", dtype), TARGETS, rank=16).to("cuda")


def groups() -> list[Group]:
    generator = torch.Generator().manual_seed(5)

    def ids(n: int) -> list[int]:
        return torch.randint(0, 1000, (n,), generator=generator).tolist()

    return [Group(ids(p), (ids(c), ids(r))) for p, c, r in ((40, 70, 130), (3, 1, 200), (120, 90, 9), (64, 64, 64))]


def scores_and_gradients(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    batch = pack(groups()).to("cuda")
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        logps = sequence_logps(
            score_tokens(model, batch, torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32)), batch
        )
    (-torch.nn.functional.logsigmoid(0.1 * logps.view(-1, 2).diff(dim=1))).mean().backward()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    return logps.detach(), gradient


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recomputed", [0, 3])
def test_half_precision_is_as_exact_as_that_of_transformers(dtype: torch.dtype, recomputed: int) -> None:
    exact = scores_and_gradients(model(torch.float32), torch.float32)
    half = model(dtype)
    plain = scores_and_gradients(half, dtype)
    assert attach_fused(half, dtype, recomputed) == ""
    ours = scores_and_gradients(half, dtype)
    error, their_error = ((x[0] - exact[0]).abs().max() for x in (ours, plain))
    assert error <= 2 * their_error + 0.01
    assert cosine(ours[1], exact[1]) >= min(0.999, cosine(plain[1], exact[1]) - 0.001)
    assert float(ours[1].norm() / exact[1].norm()) == pytest.approx(1.0, abs=0.02)


def test_fp32_equals_transformers() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    plain_model = model(torch.float32)
    plain = scores_and_gradients(plain_model, torch.float32)
    assert attach_fused(plain_model, torch.float32) == ""
    ours = scores_and_gradients(plain_model, torch.float32)
    torch.testing.assert_close(ours[0], plain[0], atol=5e-3, rtol=1e-5)
    assert cosine(ours[1], plain[1]) > 0.99999


@pytest.mark.parametrize("recomputed", [0, 4])
def test_scoring_with_and_without_gradient_is_bit_equal(recomputed: int) -> None:
    """What makes the first loss ln 2 by construction: policy and reference go through one forward."""
    half = model(torch.bfloat16)
    assert attach_fused(half, torch.bfloat16, recomputed) == ""
    batch = pack(groups()).to("cuda")
    with_gradient = score_tokens(half, batch).logps.detach()
    with torch.no_grad():
        without = score_tokens(half, batch).logps
    assert torch.equal(with_gradient, without)


# --- other families ---------------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "mistral+window": WINDOW,
    "ministral3": {},
    "phi3+window": WINDOW,
    "smollm3": {},
    "granite": {},
    "olmo3": WINDOW,
    "gemma2": WINDOW,  # A soft cap: rows, without flash attention.
    "gemma3_text": WINDOW,
    "gemma3_text with heads of 256": WINDOW | {"head_dim": 256},
    "glm4": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "gpt_oss": WINDOW,
}


def family(name: str, dtype: torch.dtype) -> Any:
    attention.register()
    base = tiny_model(name.partition(" ")[0], **(WIDE | FAMILIES[name]))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.div_(5)  # Of what makes a tiny model feel its attention: it is wide enough without.
    return with_lora(base.to("cuda", dtype), "all-linear", rank=16).to("cuda").eval()


def by_rows(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores and the whole gradient by the model's own forward."""
    model.zero_grad()
    logps = []
    for group in groups():
        for completion in group.completions:
            row = torch.tensor([[*group.prompt, *completion]], device="cuda")
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                logits = causal_lm(model)(input_ids=row, use_cache=False).logits
            scored = logits[0, len(group.prompt) - 1 : -1].float().log_softmax(-1)
            logps.append(scored.gather(1, row[0, len(group.prompt) :, None]).sum())
    stacked = torch.stack(logps)
    (-torch.nn.functional.logsigmoid(0.1 * stacked.view(-1, 2).diff(dim=1))).mean().backward()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    return stacked.detach(), gradient


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_half_precision_is_as_exact_as_its_own_forward(name: str, recomputed: int) -> None:
    exact = by_rows(family(name, torch.float32), torch.float32)
    half = family(name, torch.bfloat16)
    plain = by_rows(half, torch.bfloat16)
    assert attach_fused(half, torch.bfloat16, recomputed) == ""
    ours = scores_and_gradients(half, torch.bfloat16)
    error, their_error = ((x[0] - exact[0]).abs().max() for x in (ours, plain))
    assert error <= 3 * their_error + 0.01  # Two roundings; one of 14 families was at 2.1 times.
    assert 1 - cosine(ours[1], exact[1]) <= 1.5 * (1 - cosine(plain[1], exact[1])) + 0.001
    assert float(ours[1].norm() / exact[1].norm()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_fp32_equals_its_own_forward(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model_ = family(name, torch.float32)
    plain = by_rows(model_, torch.float32)
    assert attach_fused(model_, torch.float32) == ""
    ours = scores_and_gradients(model_, torch.float32)
    torch.testing.assert_close(ours[0], plain[0], atol=5e-3, rtol=1e-5)
    assert cosine(ours[1], plain[1]) > 0.9999
