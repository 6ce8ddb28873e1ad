"""Delta nets by fla and frozen experts by grouped products, in 16 bit on a GPU: as close to fp32 as PyTorch's
own forms in the same precision are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3_5TextConfig, Qwen3MoeConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dpo_assets.planning.delta_nets import has_fla, why_wrong_gradient
from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.recurrent import convolution, delta_net
from dpo_assets.training.engines.recurrent.delta_net import DeltaNet
from dpo_assets.training.models.experts import experts_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_fla = pytest.mark.skipif(not has_fla(), reason="needs fla-core")
WRONG_GRADIENT = why_wrong_gradient(torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
HIDDEN, TIMES = 256, 2.0  # Of the error of PyTorch's form: both round, in other orders.


@pytest.fixture
def batch() -> PackedBatch:
    sizes = ((200, 70, 130), (3, 1, 200), (64, 64, 64), (1, 130, 2))
    return pack([Group(range(p), (range(c), range(r))) for p, c, r in sizes]).to("cuda")


@pytest.fixture
def mixer() -> Any:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=64, linear_value_head_dim=64,
    )  # fmt: skip
    return Qwen3_5GatedDeltaNet(config, 0).cuda()


def _computed(mixer: Any, batch: PackedBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mixer's output and the gradient of its input, both of one stream."""
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(len(batch.ids), HIDDEN, device="cuda", generator=generator)
    net = DeltaNet.of(mixer.to(dtype))
    assert net is not None
    leaf = x.to(dtype).requires_grad_()
    out = net(leaf, batch)
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out).cumsum(0).cos())
    return out.detach().float(), gradient.float()


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        for module, name in (
            (delta_net, "fla_delta_rule"),
            (delta_net, "fla_gated_norm"),
            (convolution, "fla_convolution"),
        ):
            patch.setattr(module, name, lambda device: None)
        yield patch


@needs_fla
@pytest.mark.skipif(bool(WRONG_GRADIENT), reason=WRONG_GRADIENT)
def test_flas_kernels_start_answers_from_their_prompts_state_and_bring_its_gradient_back(
    mixer: Any, batch: PackedBatch, by_pytorch: pytest.MonkeyPatch
) -> None:
    exact = _computed(mixer, batch, torch.float32)
    plain = _computed(mixer, batch, torch.bfloat16)
    by_pytorch.undo()
    ours = _computed(mixer, batch, torch.bfloat16)
    for one, other, wanted in zip(ours, plain, exact, strict=True):
        scale = float(wanted.norm())
        error, usual = float((one - wanted).norm()) / scale, float((other - wanted).norm()) / scale
        assert error <= TIMES * usual + 1e-3, f"{error:.2e}, PyTorch {usual:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_frozen_experts_are_those_of_a_loop(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config).cuda()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05).requires_grad_(False)
    x = torch.randn(300, HIDDEN, device="cuda")
    weights, index = torch.randn(300, 8, device="cuda").softmax(-1).topk(2, dim=-1)

    def computed(kind: torch.dtype, *, loop: bool) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_(), weights.to(kind).requires_grad_()]
        module = experts.to(kind)
        run = module if loop else lambda *args: experts_forward(module, *args)
        out = run(leaves[0], index, leaves[1])
        return [part.float() for part in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out)))]

    exact, plain = computed(torch.float32, loop=True), computed(dtype, loop=True)
    for one, other, wanted in zip(computed(dtype, loop=False), plain, exact, strict=True):
        scale = float(wanted.norm())
        assert float((one - wanted).norm()) / scale <= TIMES * float((other - wanted).norm()) / scale + 1e-3
