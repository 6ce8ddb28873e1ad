"""Plans: what a recipe, a model, a dataset and a device become."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.planning.cards import CARDS
from dpo_assets.planning.families import describe
from dpo_assets.planning.matrices import Matrices
from dpo_assets.planning.memory import LARGEST_SCORED, forward_peak
from dpo_assets.planning.offers import EngineOffer
from dpo_assets.planning.plan import TrainingPlan, steps_of
from dpo_assets.planning.precision import Device
from dpo_assets.planning.shape import ModelShape
from dpo_assets.planning.sizes import find_model
from dpo_assets_tests.planning.cases import (
    CPU,
    EIGHT_B,
    H200,
    L4,
    ONE_B,
    RTX_4090,
    SEVENTY_B,
    T4,
    TINY,
    data,
    planned,
)
from dpo_assets_tests.samples import plan, recipe

GEMMA3, PHI4 = (find_model(name).shape for name in ("gemma3-4b", "phi4-mini"))
COHERE, LLAMA4 = (
    GEMMA3.model_copy(update={"decoder": describe({"model_type": family})}) for family in ("cohere", "llama4_text")
)
OTHER = EIGHT_B.model_copy(update={"decoder": None, "architecture": "MptForCausalLM"})


@pytest.mark.parametrize(
    ("pairs", "batch", "epochs", "steps"),
    [
        (100, 10, 1.0, 10),
        (101, 10, 1.0, 11),
        (9, 10, 1.0, 1),
        (100, 10, 2.5, 25),
        (101, 10, 2.0, 22),
        (100, 10, 0.25, 3),
        (0, 10, 1.0, 1),
    ],
)
def test_the_last_smaller_batch_of_an_epoch_is_a_step_too(pairs: int, batch: int, epochs: float, steps: int) -> None:
    assert steps_of(pairs, batch, epochs) == steps


@settings(max_examples=60, deadline=None)
@given(pairs=st.integers(1, 10**6), batch=st.integers(1, 1024), epochs=st.floats(0.01, 20))
def test_steps_see_every_pair_of_every_epoch_and_at_most_one_batch_more(pairs: int, batch: int, epochs: float) -> None:
    steps = steps_of(pairs, batch, epochs)
    assert steps >= 1
    assert steps * batch >= pairs * epochs * (1 - 1e-12)
    assert steps < (pairs / batch + 1) * epochs + 1


def test_a_plan_carries_the_recipe_the_dataset_and_the_device() -> None:
    made = planned(ONE_B, L4, dpo={"batch_size": 32, "epochs": 2.0}, sft={"batch_size": 10}, lora={"rank": 8})
    assert (made.device, made.device_name, made.precision, made.kernels) == ("cuda", "L4", "bf16", "fused")
    assert (made.train_pairs, made.eval_pairs, made.max_length, made.longest_pair) == (1000, 100, 1024, 1500)
    assert made.parameters == ONE_B.parameters
    assert (made.dpo_steps, made.sft_steps) == (64, 100)
    assert (made.lora.rank, made.dpo.batch_size, made.sft.batch_size) == (8, 32, 10)
    assert TrainingPlan.model_validate_json(made.model_dump_json()) == made


def test_a_plan_written_before_it_named_parts_still_reads() -> None:
    old = plan().model_dump(exclude={"memory_parts", "fits", "would_fit", "longest_pair", "recomputed_layers"})
    assert TrainingPlan.model_validate(old).fits


def test_an_adopted_base_takes_no_sft_step() -> None:
    assert planned(ONE_B, L4, sft={"strategy": "adopt"}).sft_steps == 0


def test_a_precision_that_cannot_be_is_refused_before_anything_is_planned() -> None:
    with pytest.raises(ConfigError, match="no bf16"):
        planned(ONE_B, T4, hardware={"precision": "bf16"})


def test_fp8_is_planned_where_the_card_has_it() -> None:
    made, wide = (planned(EIGHT_B, L4, hardware={"precision": p}) for p in ("fp8", "bf16"))
    assert made.precision == "fp8"
    assert made.memory_parts["weights"] < 0.6 * wide.memory_parts["weights"]


# Kernels


@pytest.mark.parametrize(
    ("shape", "device", "dpo", "kernels"),
    [
        (EIGHT_B, H200, {}, "fused"),
        (EIGHT_B, T4, {}, "fused"),
        (EIGHT_B, CPU, {}, "transformers"),
        (OTHER, H200, {}, "transformers"),
        (GEMMA3, H200, {}, "fused"),
        (PHI4, H200, {}, "fused"),
        (COHERE, H200, {}, "transformers"),
        (LLAMA4, H200, {}, "rows"),
        (LLAMA4, CPU, {}, "rows"),
        (LLAMA4, H200, {"trainer": "trl"}, "transformers"),
        (EIGHT_B, H200, {"trainer": "trl"}, "transformers"),
    ],
)
def test_fused_layers_are_used_where_they_compute_the_model(
    shape: ModelShape, device: Device, dpo: dict[str, Any], kernels: str
) -> None:
    assert planned(shape, device, dpo=dpo).kernels == kernels


@pytest.mark.parametrize("kernels", ["transformers", "unsloth"])
def test_other_kernels_are_used_when_they_are_named(kernels: str) -> None:
    assert planned(EIGHT_B, H200, hardware={"kernels": kernels}).kernels == kernels


@pytest.mark.parametrize(
    ("kernels", "shape", "message"),
    [
        (
            "fused",
            OTHER,
            "serve MptForCausalLM with max_length 1024: nothing describes what this architecture computes",
        ),
        ("fused", COHERE, "they have no words for norms that take the mean away, attention and MLP side by side"),
        ("transformers", LLAMA4, "a packed stream does not tell it the chunk that a token attends in"),
        ("unsloth", GEMMA3, "its shared-prefix forward knows llama, mistral, qwen2, qwen3, cohere, granite alone"),
    ],
)
def test_kernels_asked_for_a_model_that_they_do_not_compute_are_refused_with_the_reason(
    kernels: str, shape: ModelShape, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(shape, H200, hardware={"kernels": kernels})
    assert message in str(refused.value)
    assert "Use `auto`" in str(refused.value)


def test_rows_that_change_the_rotary_tables_of_others_are_not_packed() -> None:
    """Phi-4's tables turn from those of short rows to those of long ones for a whole forward."""
    long = data(max_length=8_192, longest_pair=9_000)
    assert planned(PHI4, H200, long).kernels == "rows"
    with pytest.raises(ConfigError, match=r"beyond 4,096 tokens its rotary tables are those of the longest row"):
        planned(PHI4, H200, long, hardware={"kernels": "fused"})


def test_unsloth_has_fp8_only_from_hopper_on() -> None:
    assert planned(EIGHT_B, H200, hardware={"kernels": "unsloth", "precision": "fp8"}).precision == "fp8"
    with pytest.raises(ConfigError, match=r"`unsloth` cannot train in fp8: it has fp8 from capability 9\.0 on"):
        planned(EIGHT_B, L4, hardware={"kernels": "unsloth", "precision": "fp8"})


# Memory


@pytest.mark.parametrize("device", [CPU, T4, L4, H200], ids=lambda device: device.name)
@pytest.mark.parametrize("shape", [TINY, ONE_B, EIGHT_B, SEVENTY_B], ids=lambda shape: str(shape.parameters))
@pytest.mark.parametrize("longest", [1, 1500, 50_000])
def test_a_forward_takes_the_longest_pair_and_a_plan_says_whether_that_fits(
    device: Device, shape: ModelShape, longest: int
) -> None:
    made = planned(shape, device, data(longest_pair=longest, mean_pair=longest / 2))
    assert made.token_budget >= longest
    assert made.memory_gib == pytest.approx(sum(made.memory_parts.values()))
    assert made.memory_gib > made.memory_parts["weights"] > 0
    if made.fits:
        assert made.memory_gib <= made.memory_available_gib
        assert made.would_fit == []
    assert made.gradient_checkpointing is (made.recomputed_layers > 0)


def test_a_plan_has_forwards_fitted_to_the_engine_that_takes_over() -> None:
    offers = (
        EngineOffer(name="fused", token_budget=4000, recomputed_layers=0),
        EngineOffer(name="transformers", token_budget=3000, recomputed_layers=7, why_not="slower"),
        EngineOffer(name="rows", token_budget=900, recomputed_layers=9, why_not="slower"),
        EngineOffer(name="unsloth", why_not="not installed"),
    )
    numbers = {"token_budget": 4000, "reference_budget": 16_000, "recomputed_layers": 0, "longest_pair": 600}
    whole = plan().model_copy(update={"kernels": "fused", "engines": offers} | numbers)

    def fitted(to: TrainingPlan) -> list[tuple[int, int]]:
        names = ("fused", "transformers", "rows", "rows, own logits", "unsloth")
        return [(p.token_budget, p.recomputed_layers) for p in map(to.fitted_to, names)]

    assert fitted(whole) == [(4000, 0), (3000, 7), (900, 9), (900, 9), (4000, 0)]
    half = whole.with_half_budget()
    assert half is not None
    # A stage that ran out of memory must come back with less, whatever computes it; the longest pair is the least.
    assert fitted(half) == [(2000, 0), (1500, 7), (600, 9), (600, 9), (2000, 0)]
    assert (half.reference_budget, whole.fitted_to("rows").reference_budget) == (2000, 900)


def test_the_memory_limit_of_the_recipe_lowers_what_is_available_and_never_raises_it() -> None:
    assert planned(ONE_B, L4, hardware={"memory_gib": 10.0}).memory_available_gib == 10.0
    assert planned(ONE_B, L4, hardware={"memory_gib": 1000.0}).memory_available_gib == L4.memory_gib
    limited, free = planned(ONE_B, L4, hardware={"memory_gib": 4.5}), planned(ONE_B, L4)
    assert limited.memory_gib <= 4.5 < free.memory_gib


def test_the_precision_is_chosen_for_the_memory_that_the_recipe_allows() -> None:
    limited = planned(EIGHT_B, H200, hardware={"memory_gib": 14.5})
    assert limited.precision == "4bit"
    assert limited.memory_gib <= 14.5


@settings(max_examples=25, deadline=None)
@given(less=st.floats(2.0, 100.0), more=st.floats(1.0, 100.0))
def test_a_card_with_more_memory_never_makes_a_plan_worse(less: float, more: float) -> None:
    order = ["4bit", "bf16"]
    small, large = (planned(EIGHT_B, Device("cuda", "card", gib, (8, 0))) for gib in (less, less + more))
    assert order.index(large.precision) >= order.index(small.precision)
    assert large.fits >= small.fits


# What would fit


def test_a_plan_that_does_not_fit_names_a_smaller_precision_and_the_smallest_card() -> None:
    made = planned(SEVENTY_B, H200, data(longest_pair=2048), hardware={"precision": "bf16"})
    assert not made.fits
    precision, card = made.would_fit
    assert precision.startswith("set hardware.precision to `8bit` (peak ")
    assert card.startswith("use a B200 (178.3 GiB, `b200`: bf16, peak ")


def test_a_plan_that_does_not_fit_names_a_shorter_length() -> None:
    made = planned(EIGHT_B, T4, data(max_length=16_384, longest_pair=32_768, mean_pair=16_384.0))
    (length,) = [said for said in made.would_fit if "max_length" in said]
    shorter = int(length.split()[3])
    assert shorter in (8192, 4096, 2048)
    cut = data(max_length=shorter, longest_pair=2 * shorter, mean_pair=2.0 * shorter)
    assert planned(EIGHT_B, T4, cut).fits
    twice = data(max_length=2 * shorter, longest_pair=4 * shorter, mean_pair=4.0 * shorter)
    assert not planned(EIGHT_B, T4, twice).fits


@pytest.mark.parametrize("shape", [EIGHT_B, SEVENTY_B], ids=["8b", "70b"])
def test_the_card_that_is_named_is_the_smallest_that_fits(shape: ModelShape) -> None:
    small = Device("cuda", "small", 4.0, (8, 0))
    (said,) = [text for text in planned(shape, small).would_fit if text.startswith("use a")]
    fitting = [card for card in CARDS if planned(shape, card.device()).fits]
    smallest = min(fitting, key=lambda card: card.memory_gib)
    assert f"`{smallest.key}`" in said


def test_a_cpu_too_small_is_told_of_a_card_though_it_has_less_memory() -> None:
    made = planned(EIGHT_B, CPU)
    assert not made.fits
    assert "`rtx2080ti`: 4bit" in made.would_fit[-1]


def test_what_fits_nowhere_is_told_nothing() -> None:
    huge = SEVENTY_B.model_copy(update={"layers": 800, "parameters": 700_000_000_000})
    made = planned(huge, H200)
    assert (made.fits, made.would_fit) == (False, [])


# The reference pass


@pytest.mark.parametrize("precision", ["bf16", "4bit"])
def test_the_reference_pass_has_larger_forwards_in_the_memory_of_training(precision: str) -> None:
    made = planned(EIGHT_B, RTX_4090, hardware={"precision": precision, "memory_gib": 20.0})
    assert made.kernels == "fused"
    times = made.reference_budget / made.token_budget
    assert times in (2, 4, 8)
    assert made.reference_budget <= LARGEST_SCORED
    assert forward_peak(EIGHT_B, made.precision, made.reference_budget, "cuda") <= made.memory_gib


def test_other_engines_score_the_reference_in_forwards_of_training() -> None:
    for device, kernels in ((H200, "transformers"), (H200, "rows"), (CPU, "fused")):
        made = planned(ONE_B, device, hardware={"kernels": kernels})
        assert made.reference_budget == made.token_budget


# After running out of memory


def test_a_reference_pass_that_ran_out_gets_smaller_forwards_where_training_has_the_smallest_already() -> None:
    least = plan(token_budget=600, reference_budget=4800, longest_pair=600)
    smaller = least.with_half_budget()
    assert smaller is not None
    assert (smaller.token_budget, smaller.reference_budget) == (600, 600)
    assert smaller.with_half_budget() is None


@settings(max_examples=60, deadline=None)
@given(budget=st.integers(1, 50_000), longest=st.integers(0, 50_000))
def test_half_a_budget_never_cuts_the_longest_pair_and_always_shrinks(budget: int, longest: int) -> None:
    before = plan(token_budget=max(budget, longest), longest_pair=longest)
    after = before.with_half_budget()
    if after is None:
        assert before.token_budget <= max(longest, 1)
        return
    assert max(longest, 1) <= after.token_budget < before.token_budget
    assert after.token_budget in (longest, before.token_budget // 2)
    assert (after.sft_part(), after.dpo_part()) == (before.sft_part(), before.dpo_part())


def test_the_budget_of_a_rtx_4090_can_be_halved_down_to_the_longest_pair() -> None:
    made: TrainingPlan | None = planned(ONE_B, RTX_4090, data(longest_pair=1000))
    budgets = []
    while made:
        budgets.append(made.token_budget)
        made = made.with_half_budget()
    assert len(budgets) > 2
    assert budgets[-1] == 1000


# Identity


CHANGED: dict[str, dict[str, Any]] = {
    "dpo": {"dpo": recipe(dpo={"beta": 0.3}).dpo},
    "sft": {"sft": recipe(sft={"epochs": 2.0}).sft},
    "lora": {"lora": recipe(lora={"rank": 2}).lora},
    "precision": {"precision": "4bit"},
    "kernels": {"kernels": "fused"},
    "the card's 16 bit, unused": {"half": "fp16"},
    "checkpointing": {"gradient_checkpointing": True, "recomputed_layers": 3},
    "predictions": {"engines": (EngineOffer(name="rows", pairs_per_s=3.0, peak_gib=4.0, why_not="slower"),)},
    "estimate": {"memory_gib": 1.0, "memory_available_gib": 1.0, "memory_parts": {"weights": 1.0}},
    "budget": {"token_budget": 99, "longest_pair": 98},
    "fit": {"fits": False, "would_fit": ["use a larger card"]},
}


@pytest.mark.parametrize(
    ("change", "sft", "dpo"),
    [
        ("dpo", False, True),
        ("sft", True, False),
        ("lora", True, True),
        ("precision", True, True),
        ("kernels", True, True),
        ("the card's 16 bit, unused", False, False),
        ("checkpointing", False, False),
        ("estimate", False, False),
        ("predictions", False, False),
        ("budget", False, False),
        ("fit", False, False),
    ],
)
def test_a_stage_is_trained_again_only_for_a_change_that_it_depends_on(change: str, sft: bool, dpo: bool) -> None:
    before, after = plan(), plan(**CHANGED[change])
    assert (before.sft_part() != after.sft_part()) is sft
    assert (before.dpo_part() != after.dpo_part()) is dpo


def test_what_a_quantised_base_computes_in_is_part_of_what_is_trained() -> None:
    before, after = (plan(precision="4bit", half=half) for half in ("bf16", "fp16"))
    assert before.sft_part() != after.sft_part()
    assert before.dpo_part() != after.dpo_part()


MIXTURE = EIGHT_B.model_copy(
    update={
        "matrices": (
            Matrices.of("self_attn.q_proj", "linear", [(64, 64)] * 2),
            Matrices.of("mlp.experts.down_proj", "experts", [(64, 64)] * 8),
        ),
    }
)


@pytest.mark.parametrize("section", ["sft", "dpo"])
def test_routers_are_balanced_on_the_kernels_that_hear_them(section: str) -> None:
    balanced = {section: {"router_balance": 0.01}}
    assert planned(MIXTURE, H200, **balanced).kernels == "transformers"
    for kernels in ("unsloth", "rows"):
        with pytest.raises(
            ConfigError, match=f"`{kernels}` do not tell what routers say.*use `transformers` or `auto`"
        ):
            planned(MIXTURE, H200, hardware={"kernels": kernels}, **balanced)


def test_routers_of_a_dense_model_cannot_be_balanced() -> None:
    with pytest.raises(ConfigError, match=r"has no experts; set sft\.router_balance and dpo\.router_balance to 0"):
        planned(EIGHT_B, H200, dpo={"router_balance": 0.01})
    adopted = {"sft": {"router_balance": 0.01, "strategy": "adopt"}}  # No SFT, so nothing is asked for.
    assert planned(EIGHT_B, H200, **adopted).kernels == "fused"
