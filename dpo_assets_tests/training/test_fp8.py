"""Base weights in fp8: how far codes are from weights, who computes with them, and what the adapter on top stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.fused.decoder import attach_fused
from dpo_assets.training.engines.fused.quantised import RowScaled, quantised_weight
from dpo_assets.training.models.fp8 import LARGEST, Fp8Linear, quantise_layers, quantise_rows
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps
from dpo_assets_tests.training.conftest import PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import ROW, run_dpo, short_plan, write_pairs

PROJECTIONS = 7
LAYERS = 5


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def few(pairs: Path) -> list[Group]:
    return [dpo_group(row, ROW) for row in load_split(pairs, "train")]


# --- codes and scales ---------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices whose rows differ by many orders of magnitude, with outliers, empty rows and single columns."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    values = st.floats(-1.0, 1.0, width=32)
    matrix = torch.tensor(draw(st.lists(values, min_size=rows * columns, max_size=rows * columns)))
    powers = torch.tensor(draw(st.lists(st.integers(-8, 8), min_size=rows, max_size=rows)))
    return matrix.view(rows, columns) * 10.0 ** powers[:, None]


@settings(max_examples=300)
@given(weights())
def test_no_weight_is_further_off_than_half_a_step_of_its_code(weight: Tensor) -> None:
    codes, scale = quantise_rows(weight)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, weight.shape[:1])
    assert (scale > 0).all()
    restored = codes.double() * scale.double()[:, None]
    # Three mantissa bits: steps of 1/8 of the power of two below a value, and of 2^-9 under the smallest normal code.
    step = torch.maximum(weight.double().abs() / 16, scale.double()[:, None] * 2.0**-10)
    assert ((restored - weight.double()).abs() <= step * (1 + 1e-5)).all()
    assert (restored.sign() * weight.sign() >= 0).all()


@given(weights())
def test_the_largest_value_of_a_row_takes_the_largest_code(weight: Tensor) -> None:
    codes, scale = quantise_rows(weight)
    largest = weight.abs().amax(dim=1)
    there = largest > 1e-10
    assert (codes.float().abs().amax(dim=1)[there] == LARGEST).all()
    torch.testing.assert_close((LARGEST * scale)[there], largest[there])


def test_a_row_of_zeros_stays_one_and_no_code_is_nan() -> None:
    weight = torch.zeros(2, 8)
    weight[1] = torch.tensor([1e-40, -1e-38, 3e38, 1.0, -3e38, 0.0, 1e30, -0.0])
    codes, scale = quantise_rows(weight)
    assert (codes[0].float() == 0).all()
    assert codes.float().isfinite().all()
    assert scale.isfinite().all()


@given(weights(), st.integers(-3, 3))
def test_a_row_times_a_power_of_two_has_the_same_codes(weight: Tensor, power: int) -> None:
    weight = weight[weight.abs().amax(dim=1) > 1e-6]
    (codes, scale), (others, other) = quantise_rows(weight), quantise_rows(weight * 2.0**power)
    assert torch.equal(codes.float(), others.float())
    assert torch.equal(scale * 2.0**power, other)


def test_a_normal_weight_is_off_by_the_few_per_cent_that_the_format_costs() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise_rows(weight)
    error = (codes.float() * scale[:, None] - weight).pow(2).mean().sqrt() / weight.pow(2).mean().sqrt()
    assert 0.01 < error < 0.04


# --- the layer ----------------------------------------------------------------------------------------------------


def quantised_linear(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Fp8Linear, Tensor]:
    """(a layer [5 -> 7], the weight it stands for)."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 7, bias=bias, dtype=dtype)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.config = Body(), Qwen2Config(num_hidden_layers=1)

        def get_decoder(self) -> Body:
            return self.body

    torch.manual_seed(0)
    model = Model()
    quantise_layers(model, "cpu")
    layer = model.body.layers[0]
    assert isinstance(layer, Fp8Linear)
    return layer, layer.codes.float() * layer.weight_scale[:, None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_a_linear_layer_of_its_restored_weight(bias: bool, dtype: torch.dtype) -> None:
    layer, weight = quantised_linear(bias)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = F.linear(x, weight.to(dtype), layer.bias.to(dtype) if bias else None)
    assert torch.equal(y, expected)


def test_gradients_pass_through_to_the_input_and_the_weight_takes_none() -> None:
    layer, weight = quantised_linear(bias=False)
    x = torch.randn(3, 5, requires_grad=True)
    layer(x).pow(2).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.T) @ weight)
    assert not layer.weight.requires_grad


def test_the_layer_keeps_one_byte_a_weight_and_no_floating_point_copy() -> None:
    layer, _ = quantised_linear(bias=False)
    assert (layer.weight.dtype, layer.weight.numel()) == (torch.uint8, 35)
    assert layer.codes.data_ptr() == layer.weight.data_ptr()


# --- a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(model_folder: Path, plan_for: PlanMaker) -> Any:
    """The built-in model with fp8 weights, the rest of it in fp32 so that two paths can be compared closely."""
    lm = load_base(model_folder, plan_for())
    quantise_layers(lm, "cpu")
    return lm


def with_adapter(lm: Any, plan_for: PlanMaker, *, random: bool = True) -> PeftModel:
    model = attach_adapter(lm, plan_for(), None, seed=0, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad and random:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model


def test_the_projections_are_quantised_and_nothing_else(base: Any, model_folder: Path, plan_for: PlanMaker) -> None:
    before = dict(load_base(model_folder, plan_for()).named_modules())
    quantised = {name for name, module in base.named_modules() if isinstance(module, Fp8Linear)}
    assert len(quantised) == LAYERS * PROJECTIONS
    assert quantised == {name for name, m in before.items() if isinstance(m, nn.Linear) and ".layers." in name}
    for name, module in base.named_modules():
        own = [p for p in module.parameters(recurse=False) if name not in quantised]
        assert all(p.dtype == torch.float32 for p in own), name
        assert all(torch.equal(p, q) for p, q in zip(own, before[name].parameters(recurse=False), strict=False)), name


def test_scores_stay_near_those_of_the_whole_weights(
    base: Any, model_folder: Path, plan_for: PlanMaker, few: list[Group]
) -> None:
    (ours, lengths), (theirs, _) = (score_groups(m, few, 1000) for m in (base, load_base(model_folder, plan_for())))
    per_token = [abs(a - b) / n for a, b, n in zip(ours, theirs, lengths, strict=True)]
    assert 0 < max(per_token) < 0.1
    assert ours != theirs


def test_an_adapter_on_top_is_fp32_and_starts_as_its_base(base: Any, plan_for: PlanMaker, few: list[Group]) -> None:
    bare, _ = score_groups(base, few, 1000)
    model = with_adapter(base, plan_for, random=False)
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(factors) == 2 * LAYERS * PROJECTIONS
    assert {p.dtype for p in factors.values()} == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == factors.keys()
    assert score_groups(model, few, 1000)[0] == pytest.approx(bare, abs=1e-4)


def loss_and_gradients(model: PeftModel, *forwards: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    scores = []
    for groups in forwards:
        batch = pack(groups)
        logps = sequence_logps(score_tokens(model, batch), batch)
        F.logsigmoid(logps.view(-1, 2).diff(dim=1)).sum().backward()
        scores.append(logps.detach())
    return torch.cat(scores), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recomputed", [0, 2])
def test_fused_layers_on_codes_give_the_scores_and_gradients_of_plain_ones(
    recomputed: int, base: Any, plan_for: PlanMaker, few: list[Group]
) -> None:
    """The fused layers restore every weight into one matrix that all of them share; several forwards use it in turn."""
    model = with_adapter(base, plan_for)
    theirs = loss_and_gradients(model, few)
    assert attach_fused(model, torch.float32, recomputed) == ""
    ours = loss_and_gradients(model, few[:2], few[2:])
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-3, rtol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    with model.disable_adapter():
        off = score_groups(model, few, 1000)[0]
    assert off != pytest.approx(ours[0].tolist(), abs=1.0)


def test_a_bias_beside_codes_is_fused_too(plan_for: PlanMaker) -> None:
    """As in Qwen2, whose q, k and v have one."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    lm = Qwen2ForCausalLM(config)
    for name, p in lm.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    quantise_layers(lm, "cpu")
    group = [Group([5, 6, 7], ([8, 9], [10, 11, 12]))]
    row = torch.tensor([[5, 6, 7, 10, 11, 12]])
    with torch.no_grad():
        logps = lm(input_ids=row).logits[0, 2:-1].log_softmax(-1).gather(-1, row[0, 3:, None])
    assert attach_fused(lm, torch.float32) == ""
    assert score_groups(lm, group, 100)[0][1] == pytest.approx(float(logps.sum()), abs=1e-4)


def test_fused_layers_hold_no_second_copy_of_the_weights(base: Any, plan_for: PlanMaker) -> None:
    layer = base.get_decoder().layers[0].mlp.down_proj
    held = quantised_weight(layer)
    assert isinstance(held, RowScaled)
    assert held.codes.data_ptr() == layer.weight.data_ptr()
    out = torch.zeros(layer.out_features, layer.in_features + 3)
    held.dequantise(out[:, : layer.in_features])
    assert torch.equal(out[:, : layer.in_features], layer.codes.float() * layer.weight_scale[:, None])
    assert (out[:, layer.in_features :] == 0).all()


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["cached", "adapter", "model"])
def test_the_dpo_stage_trains_an_fp32_adapter_on_an_fp8_base(
    strategy: str,
    plan_for: PlanMaker,
    train_spec: SpecMaker,
    pairs: Path,
    tmp_path: Path,
) -> None:
    """No planner asks for it on a CPU. The fused layers compute there in bf16, as on a GPU but slower; Transformers'
    layers would need the autocast that only a GPU run has."""
    plan = short_plan(
        plan_for, {"reference_strategy": strategy}, steps=3, precision="fp8", kernels="fused", recomputed_layers=1
    )
    run = run_dpo(train_spec(plan, tmp_path, dataset=pairs))
    assert run.report["kernels"] == "fused"
    assert run.losses[0] == pytest.approx(0.693147, abs=5e-4)
    assert run.losses[-1] < 0.66
    assert {values.dtype for values in run.adapter.values()} == {torch.float32}
    assert all(values.isfinite().all() for values in run.adapter.values())
    assert not [name for name in run.adapter if "weight_scale" in name or "base_layer" in name]
