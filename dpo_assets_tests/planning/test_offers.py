"""Which engine `auto` takes: the fastest of what is installed and computes the model, with the others beside it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import replace
from typing import Any, get_args

import pytest

from dpo_assets.assets.dpo_plan import engines_table
from dpo_assets.errors import ConfigError
from dpo_assets.planning.decision import decide
from dpo_assets.planning.describe import offer_sentence, plan_rows, supposed_pairs
from dpo_assets.planning.offers import BUILT_IN, EngineOffer, installed_here
from dpo_assets.planning.plan import TrainingPlan, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.shape import Kernels, ModelShape, Part
from dpo_assets.planning.sizes import find_model
from dpo_assets.planning.targets import resolve_targets
from dpo_assets.planning.work import Work
from dpo_assets_tests.planning.cases import A100, CPU, EIGHT_B, H200, L4, T4, V100, data, shape_of
from dpo_assets_tests.planning.measured import SHAPES
from dpo_assets_tests.samples import recipe

WITH_UNSLOTH: frozenset[Kernels] = BUILT_IN | {"unsloth"}
UNDESCRIBED = EIGHT_B.model_copy(update={"decoder": None, "architecture": "MptForCausalLM"})


def made(
    shape: ModelShape, device: Device = H200, installed: frozenset[Part] = WITH_UNSLOTH, **sections: Any
) -> TrainingPlan:
    return make_plan(recipe(**sections), shape, data(), device, installed)


def offered(plan: TrainingPlan) -> dict[str, EngineOffer]:
    return {offer.name: offer for offer in plan.engines}


def without_fused(shape: ModelShape) -> ModelShape:
    """The same model with an MLP that fused layers do not compute."""
    decoder = shape.described()
    layers = tuple(replace(layer, mlp=replace(layer.mlp, activation="relu2")) for layer in decoder.layers)
    return shape.model_copy(update={"decoder": replace(decoder, layers=layers)})


@pytest.mark.parametrize("device", [H200, A100, L4, T4, V100], ids=lambda device: device.name)
def test_the_fastest_that_fits_is_taken_and_every_engine_is_told_of(device: Device) -> None:
    plan = made(EIGHT_B, device)
    offers = offered(plan)
    assert set(offers) == set(get_args(Kernels))
    assert plan.engines[0].name == plan.kernels == "fused"
    assert [offer.why_not for offer in plan.engines].index("") == 0
    assert plan.engines[0].peak_gib == pytest.approx(plan.memory_gib)
    speeds = [offer.pairs_per_s for offer in plan.engines]
    assert all(speed is not None for speed in speeds)
    assert plan.engines[0].pairs_per_s == max(s for s in speeds if s)


def test_unsloth_is_taken_where_it_is_the_fastest_and_installed() -> None:
    """Qwen3-8B in 4 bit, 10.3 GiB, where fused layers do not compute it: 4.72 pairs/s against 3.22 on an H100."""
    shape = without_fused(SHAPES["qwen3-8b"])
    small = Device("cuda", "NVIDIA H100 80GB HBM3", 10.3, (9, 0))
    plan = made(shape, small)
    assert (plan.kernels, plan.precision) == ("unsloth", "4bit")
    assert offered(plan)["transformers"].why_not == "not faster, by this prediction"
    assert "activation relu2" in offered(plan)["fused"].why_not
    assert offered(plan)["fused"].pairs_per_s is None


def test_what_is_not_installed_is_offered_and_not_taken() -> None:
    shape = without_fused(SHAPES["qwen3-8b"])
    plan = made(shape, Device("cuda", "H100", 10.3, (9, 0)), BUILT_IN)
    assert plan.kernels == "transformers"
    missing = offered(plan)["unsloth"]
    assert missing.why_not == "not installed: pip install 'dpo-assets[unsloth]'"
    assert missing.pairs_per_s is not None
    taken = offered(plan)["transformers"].pairs_per_s
    assert taken is not None
    assert missing.pairs_per_s > taken


def test_a_user_leaves_unsloth_out_by_naming_another_engine() -> None:
    shape = without_fused(SHAPES["qwen3-8b"])
    plan = made(shape, Device("cuda", "H100", 10.3, (9, 0)), hardware={"kernels": "transformers"})
    assert plan.kernels == "transformers"
    assert offered(plan)["unsloth"].why_not == "hardware.kernels asks for `transformers`"


def test_the_precision_is_the_best_that_any_engine_fits_with() -> None:
    """Unsloth keeps no inputs of recomputed layers on the GPU, so that it fits in 16 bit where others need 4."""
    data_ = data(longest_pair=6_000, mean_pair=5_000.0, max_length=4_096)
    device = Device("cuda", "H100", 20.0, (9, 0))
    shape = without_fused(EIGHT_B)
    alone, beside = (make_plan(recipe(), shape, data_, device, engines) for engines in (BUILT_IN, WITH_UNSLOTH))
    assert (alone.precision, alone.kernels) == ("4bit", "transformers")
    assert (beside.precision, beside.kernels) == ("bf16", "unsloth")
    assert "it does not fit: " in offered(beside)["transformers"].why_not


def test_an_engine_that_does_not_fit_is_not_taken_however_fast() -> None:
    long = data(longest_pair=6_000, mean_pair=5_000.0, max_length=4_096)
    small = Device("cuda", "H100", 18.8, (9, 0))
    asked = recipe(hardware={"precision": "bf16"}, dpo={"batch_size": 1_024})
    plan = make_plan(asked, EIGHT_B, long, small, WITH_UNSLOTH)
    assert (plan.kernels, plan.fits) == ("unsloth", True)
    fused = offered(plan)["fused"]
    assert fused.why_not.startswith("it does not fit: ")
    assert fused.pairs_per_s is not None
    assert plan.engines[0].pairs_per_s is not None
    assert fused.pairs_per_s > plan.engines[0].pairs_per_s


def test_nothing_is_predicted_on_a_cpu_and_the_models_own_layers_are_taken() -> None:
    plan = made(EIGHT_B, CPU)
    assert plan.kernels == "transformers"
    assert all(offer.pairs_per_s is None for offer in plan.engines)
    assert offered(plan)["fused"].why_not == "on a CPU the model's own layers are taken"


def test_a_model_that_nothing_describes_is_not_computed_by_fused_layers_nor_by_unsloth() -> None:
    plan = made(UNDESCRIBED)
    assert plan.kernels == "transformers"
    assert offered(plan)["fused"].why_not == offered(plan)["unsloth"].why_not
    assert "nothing describes" in offered(plan)["fused"].why_not


def test_trls_trainer_has_transformers_and_unsloth_alone() -> None:
    plan = made(EIGHT_B, dpo={"trainer": "trl"})
    assert plan.kernels == "unsloth"
    for name in ("fused", "rows"):
        assert offered(plan)[name].why_not == "dpo.trainer `trl` calls the model in its own way"
    assert made(EIGHT_B, installed=BUILT_IN, dpo={"trainer": "trl"}).kernels == "transformers"
    for name in ("fused", "rows"):
        with pytest.raises(ConfigError, match=f"`{name}` is for the packed trainer"):
            made(EIGHT_B, dpo={"trainer": "trl"}, hardware={"kernels": name})


def test_speedups_take_transformers_and_the_others_say_so() -> None:
    plan = made(EIGHT_B, hardware={"speedups": ["liger"]})
    assert plan.kernels == "transformers"
    assert offered(plan)["fused"].why_not == "hardware.speedups are for Transformers' layers"
    with pytest.raises(ConfigError, match="not for kernels `rows`"):
        made(EIGHT_B, hardware={"speedups": ["compile"], "kernels": "rows"})


def test_dropout_and_a_merged_reference_leave_engines_out() -> None:
    dropped = offered(made(EIGHT_B, lora={"dropout": 0.1}))
    assert "computes no dropout" in dropped["fused"].why_not
    merged = offered(made(EIGHT_B, dpo={"reference_strategy": "merged"}))
    assert "would round the adapter" in merged["unsloth"].why_not


def test_a_named_engine_is_planned_whatever_is_predicted_or_installed() -> None:
    """The worker says what is missing: a plan can be made on another machine than it runs on."""
    for name in get_args(Kernels):
        plan = made(EIGHT_B, installed=BUILT_IN, hardware={"kernels": name})
        assert (plan.kernels, plan.engines[0].name, plan.engines[0].why_not) == (name, name, "")


def test_the_engine_is_decided_after_the_precision_that_is_asked_for() -> None:
    resolved = recipe(hardware={"precision": "8bit"})
    resolved = resolved.model_copy(update={"lora": resolve_targets(resolved.lora, EIGHT_B)})
    decision = decide(resolved, EIGHT_B, data(), H200, WITH_UNSLOTH)
    assert decision.precision == "8bit"
    assert {o.name: o.why_not for o in decision.engines}["unsloth"] == "8-bit models are not on its own forward"


MOE = find_model("qwen3-30b-a3b").shape


def test_4_bit_of_a_mixture_of_experts_is_explained_and_not_taken_where_it_saves_nothing() -> None:
    """Of Qwen3-30B-A3B's 30.5 billion weights 29.0 are experts, which are parameters and are not quantised."""
    small, fitting = (Device("cuda", "NVIDIA H100 80GB HBM3", gib, (9, 0)) for gib in (40.0, 60.0))
    stays = "29.0 of 30.5 billion weights are experts and stay in 16 bit"
    kept = made(MOE, small)
    assert (kept.precision, kept.fits) == ("bf16", False)
    assert kept.precision_reason.endswith(f"hardly less; {stays}")
    taken = made(MOE, fitting)
    assert (taken.precision, taken.fits) == ("4bit", True)
    assert taken.precision_reason.endswith(stays)
    # Of a dense model nothing is said, and 4 bit are planned although they do not fit: they save the most.
    dense = made(find_model("70b").shape, Device("cuda", "H100", 20.0, (9, 0)))
    assert dense.precision == "4bit"
    assert "experts" not in dense.precision_reason


def test_a_run_that_its_own_cap_leaves_too_little_is_told_to_raise_it_first() -> None:
    asked: dict[str, Any] = {"hardware": {"memory_gib": 8.0, "precision": "bf16"}}
    plan = made(EIGHT_B, A100, **asked)
    assert not plan.fits
    found = re.fullmatch(r"raise hardware.memory_gib to ([\d.]+) \(peak .* GiB\)", plan.would_fit[0])
    assert found is not None
    asked["hardware"]["memory_gib"] = float(found[1])
    assert made(EIGHT_B, A100, **asked).fits
    asked["hardware"]["memory_gib"] -= 0.2
    assert not made(EIGHT_B, A100, **asked).fits
    # A larger card alone does not lift the cap, and a card that is too small is no way out.
    assert all("without hardware.memory_gib" in said for said in plan.would_fit if said.startswith("use a"))
    without_room = made(find_model("70b").shape, L4, hardware={"memory_gib": 8.0, "precision": "bf16"})
    assert not any(said.startswith("raise") for said in without_room.would_fit)


def test_the_forwards_of_rows_are_counted_with_both_prompts_and_filler() -> None:
    size = find_model("8b")
    for kernels in ("fused", "rows"):
        stats = supposed_pairs(1_024)
        plan = make_plan(recipe(hardware={"kernels": kernels}), size.shape, stats, L4)
        forwards = Work.of(stats, plan.dpo).forwards(plan.kernels, plan.token_budget)
        said = dict(plan_rows(plan, size, L4))["forward"]
        assert said.endswith(f"takes about {forwards} forwards")
        if kernels == "rows":
            assert forwards > -(-16 * 1_024 // plan.token_budget)


LLAMA4 = shape_of(
    model_type="llama4_text", vocab_size=202_048, hidden_size=512, intermediate_size=1_024, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=8, head_dim=64, num_local_experts=4,
)  # fmt: skip


@pytest.mark.parametrize("device", [H200, CPU], ids=lambda device: device.name)
@pytest.mark.parametrize("kernels", ["auto", "transformers"])
def test_a_model_that_no_engine_computes_is_refused_with_every_reason_and_the_way_out(
    device: Device, kernels: str
) -> None:
    """Llama 4 runs on `rows` alone, which does not tell what routers say."""
    with pytest.raises(ConfigError, match="no engine can train") as refused:
        made(LLAMA4, device, dpo={"router_balance": 0.01}, hardware={"kernels": kernels})
    said = str(refused.value)
    assert "`transformers`: a packed stream does not tell it the chunk" in said
    assert "`rows`: it does not tell what routers say" in said
    assert said.endswith("set sft.router_balance and dpo.router_balance to 0.")
    assert "Use `auto`" not in said
    assert made(LLAMA4, device).kernels == "rows"


def test_an_engine_that_does_not_fit_is_told_by_the_numbers_that_decide() -> None:
    """Not by its peak and the card's memory, of which the first may be the smaller."""
    small = Device("cuda", "H100", 18.8, (9, 0))
    long = data(longest_pair=6_000, mean_pair=5_000.0, max_length=4_096)
    asked = recipe(hardware={"precision": "bf16"}, dpo={"batch_size": 1_024})
    for offer in make_plan(asked, EIGHT_B, long, small, WITH_UNSLOTH).engines:
        if "it does not fit" in offer.why_not:
            found = re.fullmatch(
                r"it does not fit: ([\d.]+) GiB in all, and a run can plan with ([\d.]+)", offer.why_not
            )
            assert found is not None
            needed, usable = map(float, found.groups())
            assert usable <= needed
            assert usable < small.memory_gib


def test_a_plan_says_who_computes_delta_nets() -> None:
    """PyTorch's form takes more memory and several times as long; on Hopper some versions of Triton force it."""
    shape = find_model("qwen3.5-9b").shape
    without = made(shape, A100, BUILT_IN)
    with_fla = made(shape, A100, BUILT_IN | {"delta-net"})
    said = "delta nets by PyTorch, several times slower: pip install 'dpo-assets[delta-net]'"
    assert offered(without)["fused"].note == said
    assert offered(with_fla)["fused"].note == ""
    assert said in offer_sentence(without.engines[0])
    assert "taken; delta nets by PyTorch, several times slower" in engines_table(without)
    asked = {"hardware": {"precision": "bf16", "kernels": "transformers"}}
    assert (
        made(shape, A100, BUILT_IN, **asked).memory_parts
        != made(shape, A100, BUILT_IN | {"delta-net"}, **asked).memory_parts
    )
    assert "triton>=3.7.1" in offered(made(shape, H200, BUILT_IN | {"delta-net"}))["fused"].note
    assert offered(made(shape, H200, BUILT_IN | {"delta-net", "delta-net on Hopper"}))["fused"].note == ""
    assert offered(made(EIGHT_B, A100, BUILT_IN))["fused"].note == ""


def test_an_offer_says_whose_rates_it_was_predicted_with() -> None:
    offers = offered(made(EIGHT_B, Device("cuda", "NVIDIA A10", 22.0, (8, 6))))
    assert offers["fused"].note == "at an H100's rates: NVIDIA A10 is not in the catalogue"


@pytest.mark.parametrize("triton", ["3.6.0", "3.7.1"])
def test_fla_is_found_and_not_counted_on_where_its_gradient_is_wrong(
    triton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No environment of these tests has fla-core and Triton, and one that has them is a GPU's.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "fla" else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    assert "delta-net" in installed_here()
    assert ("delta-net on Hopper" in installed_here()) is (triton == "3.7.1")


def test_installed_engines_are_found_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth patches Transformers where it is imported, so the planner may only look for it."""
    for present in ((), ("unsloth",), ("unsloth", "unsloth_zoo")):
        # No environment of these tests has Unsloth, and one that has it is a GPU's.
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, p=present: object() if name in p else None)
        assert ("unsloth" in installed_here()) is (len(present) == 2)
        assert installed_here() >= BUILT_IN
