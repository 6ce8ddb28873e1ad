"""Adapters on fused layers: which one computes, what its gradients add up to, and which layers are recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.base import attached_engine
from dpo_assets.training.engines.fused.block import FrozenBlock
from dpo_assets.training.engines.fused.decoder import attach_fused
from dpo_assets.training.engines.ladder import choose_kernels
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps
from dpo_assets.training.scoring.proof import NotExactError, assert_exact
from dpo_assets_tests.training.conftest import PlanMaker
from dpo_assets_tests.training.dense import summed_logps
from dpo_assets_tests.training.dpo_runs import (
    ROW,
    write_pairs,
)

LAYERS = 5
SCORE_TOLERANCE = 1e-3  # Nats of a whole answer: products are summed in another order.
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def few(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    pairs = write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"))
    return [dpo_group(row, ROW) for row in load_split(pairs, "train")]


@pytest.fixture
def fused_plan(plan_for: PlanMaker) -> TrainingPlan:
    return plan_for(kernels="fused", max_length=ROW)


def with_random_adapter(model_folder: Path, plan: TrainingPlan, seed: int = 1) -> PeftModel:
    """A policy whose adapter shows in every score."""
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=0, dropout=0.0)
    randomise(model, "default", seed)
    return model


def randomise(model: PeftModel, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.fixture
def two(model_folder: Path, fused_plan: TrainingPlan) -> tuple[PeftModel, PeftModel]:
    """The same policy on fused layers and on Transformers'."""
    fused, plain = (with_random_adapter(model_folder, fused_plan) for _ in range(2))
    assert choose_kernels(fused, fused_plan) == ("fused", "")
    return fused, plain


def scores(model: PeftModel, groups: Sequence[Group]) -> list[float]:
    return score_groups(model, groups, 10_000)[0]


def assert_same_scores(models: tuple[PeftModel, PeftModel], groups: Sequence[Group]) -> list[float]:
    ours, theirs = (scores(model, groups) for model in models)
    assert ours == pytest.approx(theirs, abs=SCORE_TOLERANCE)
    return theirs


def test_a_switched_off_adapter_leaves_the_base(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    on = assert_same_scores(two, few)
    with two[0].disable_adapter(), two[1].disable_adapter():
        off = assert_same_scores(two, few)
        with torch.no_grad():
            assert off == pytest.approx(summed_logps(two[1], few), abs=SCORE_TOLERANCE)
    assert off != pytest.approx(on, abs=1.0)
    assert assert_same_scores(two, few) == on


def test_the_active_adapter_computes_after_every_switch(
    two: tuple[PeftModel, PeftModel], few: list[Group], fused_plan: TrainingPlan
) -> None:
    for model in two:
        model.add_adapter("ref", model.peft_config["default"])
        randomise(model, "ref", 2)
    first = assert_same_scores(two, few)
    for model in two:
        model.set_adapter("ref")
    second = assert_same_scores(two, few)
    for model in two:
        model.set_adapter("default")
    assert assert_same_scores(two, few) == first
    assert second != pytest.approx(first, abs=1.0)


@pytest.mark.parametrize("change", ["an optimizer", "PEFT"])
def test_new_weights_are_seen(change: str, two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    before = assert_same_scores(two, few)
    for model in two:
        if change == "PEFT":
            state = {name: values * 1.5 for name, values in get_peft_model_state_dict(model).items()}
            set_peft_model_state_dict(model, state)
            continue
        trained = [p for p in model.parameters() if p.requires_grad]
        for n, p in enumerate(trained):
            p.grad = torch.full_like(p, (-1.0) ** n)
        torch.optim.AdamW(trained, lr=0.05).step()
    assert assert_same_scores(two, few) != pytest.approx(before, abs=0.1)


@pytest.mark.parametrize("between", ["another adapter", "no adapter", "a step"])
def test_a_backward_pass_refuses_matrices_that_hold_another_adapter(
    between: str, two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    """They were renewed by the forward in between, and gave the first one's gradients by the second one's factors."""
    model = two[0]
    model.add_adapter("ref", model.peft_config["default"])
    trained = [p for name, p in model.named_parameters() if ".default." in name]
    first = score_tokens(model, pack(few[:1])).logps.sum()
    if between == "another adapter":
        model.set_adapter("ref")
        scores(model, few)
        model.set_adapter("default")
    elif between == "no adapter":
        with model.disable_adapter():
            scores(model, few)
    else:
        with torch.no_grad():
            trained[0].add_(1.0)
        scores(model, few)
    with pytest.raises(RuntimeError, match="fused layers hold one adapter at a time"):
        first.backward()
    assert all(p.grad is None for p in trained)
    # Whoever asks again for the first one's forward goes on.
    score_tokens(model, pack(few[:1])).logps.sum().backward()
    assert all(p.grad is not None for p in trained)


def test_forwards_of_one_adapter_may_be_differentiated_in_any_order(
    two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    """Scoring in between reads the adapter again, and finds the same one."""
    gradients = []
    for model in two:
        first, second = (score_tokens(model, pack(part)).logps.sum() for part in (few[:1], few[1:2]))
        scores(model, few)
        second.backward()
        first.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)


def test_packing_is_checked_on_fused_layers(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    """The probe compares with the model's own forward, whose weights are views of the fused matrices by then."""
    assert_exact(two[0], few[0])
    decoder = attached_engine(two[0])
    assert decoder is not None
    before = decoder.layers[0].mixer.residual.before
    object.__setattr__(before, "weight", before.weight * 1.5)
    with pytest.raises(NotExactError, match="nats row by row"):
        assert_exact(two[0], few[0])


# --- gradients ----------------------------------------------------------------------------------------------------


def backward(model: PeftModel, *forwards: Sequence[Group]) -> None:
    """Adds up the gradients of a pair loss over forwards."""
    for groups in forwards:
        batch = pack(groups)
        logps = sequence_logps(score_tokens(model, batch), batch).view(-1, 2)
        (-torch.nn.functional.logsigmoid(0.1 * (logps[:, 0] - logps[:, 1]))).sum().backward()


def gradients(model: PeftModel) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("recomputed", [0, 3])
def test_gradients_add_up_over_the_forwards_of_a_step(
    recomputed: int, two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    fused, plain = two
    attach_fused(fused, torch.float32, recomputed)
    backward(plain, few)
    backward(fused, few[:1], few[1:4], few[4:])
    assert_same_gradients(gradients(fused), gradients(plain))
    assert all(name.split(".")[-3] in ("lora_A", "lora_B") for name in gradients(fused))


@pytest.mark.parametrize("recomputed", [0, 2, LAYERS])
def test_as_many_layers_are_recomputed_as_the_plan_says_and_the_lowest_first(
    recomputed: int, two: tuple[PeftModel, PeftModel], few: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach_fused(two[0], torch.float32, recomputed)
    decoder = attached_engine(two[0])
    assert decoder is not None
    calls: list[int] = []

    def counted(block: FrozenBlock, *args: Any, **kwargs: Any) -> Any:
        calls.extend(n for n, layer in enumerate(decoder.layers) if layer.mixer is block)
        return forward(block, *args, **kwargs)

    forward = FrozenBlock.forward
    monkeypatch.setattr(FrozenBlock, "forward", counted)
    backward(two[0], few[:1])
    assert calls[:LAYERS] == list(range(LAYERS))
    assert calls[LAYERS:] == list(reversed(range(recomputed)))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_new_step_starts_from_no_gradient(
    set_to_none: bool, two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    fused, plain = two
    backward(fused, few[:2], few[2:4])
    fused.zero_grad(set_to_none=set_to_none)
    backward(fused, few[4:5], few[5:])
    backward(plain, few[4:])
    assert_same_gradients(gradients(fused), gradients(plain))


def test_clipped_gradients_are_what_later_forwards_add_to(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    """The factors' gradients share memory; clipping and scaling in place must reach it."""
    for model in two:
        backward(model, few[:3])
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.01)
        backward(model, few[3:])
    assert_same_gradients(gradients(two[0]), gradients(two[1]))


def test_scoring_without_gradients_between_two_forwards_leaves_them_alone(
    two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    """A frozen adapter that scores the reference, and a switched-off one, come between the forwards of a step."""
    fused, plain = two
    fused.add_adapter("ref", fused.peft_config["default"])
    randomise(fused, "ref", 2)
    backward(fused, few[:3])
    fused.set_adapter("ref")
    scores(fused, few)
    fused.set_adapter("default")
    with fused.disable_adapter():
        scores(fused, few)
    backward(fused, few[3:])
    backward(plain, few)
    assert_same_gradients(gradients(fused), gradients(plain))


def test_a_frozen_policy_on_fused_layers_has_no_graph(two: tuple[PeftModel, PeftModel], few: list[Group]) -> None:
    two[0].requires_grad_(False)
    assert not score_tokens(two[0], pack(few)).logps.requires_grad


# --- what no stage does, and would go wrong silently --------------------------------------------------------------


def test_an_adapter_of_another_rank_is_computed_right_or_refused(
    two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    """TRL's frozen copy has the rank of the policy, so no strategy needs it."""
    assert_same_scores(two, few)
    for model in two:
        config = model.peft_config["default"]
        model.add_adapter("thin", LoraConfig(r=2, target_modules=config.target_modules, task_type="CAUSAL_LM"))
        randomise(model, "thin", 3)
        model.set_adapter("thin")
    try:
        assert_same_scores(two, few)
    except ConfigError:
        return


def test_gradients_that_were_replaced_between_forwards_are_added_to(
    two: tuple[PeftModel, PeftModel], few: list[Group]
) -> None:
    for model in two:
        for groups in (few[:3], few[3:]):
            backward(model, groups)
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad.clone()
    assert_same_gradients(gradients(two[0]), gradients(two[1]))
