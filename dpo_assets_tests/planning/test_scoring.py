"""What is scored as the release, and what it is computed in: both decided once, by the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_assets.assets.out_of_memory import given_up
from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.config import schedule_and_precision
from dpo_assets.checks.configuration import Configuration
from dpo_assets.contract import EvaluateSpec
from dpo_assets.errors import OutOfMemory
from dpo_assets.planning.cards import CARDS, find_card
from dpo_assets.planning.memory import FRAMEWORK_GIB, GIB, USABLE, cache_bytes, forward_peak, weights_bytes
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.scoring import GENERATION_BATCH
from dpo_assets.planning.sizes import SIZES
from dpo_assets_tests.planning.cases import CPU, EIGHT_B, L4, ONE_B, RTX_4090, SEVENTY_B, T4, data, planned

RTX_3060 = find_card("rtx3060").device()
QUANTISED = ("4bit", "8bit", "fp8")


@pytest.mark.parametrize(
    ("shape", "device", "precision", "scored"),
    [
        (ONE_B, CPU, "auto", "merged model in fp32"),
        (ONE_B, RTX_4090, "auto", "merged model in bf16"),
        (ONE_B, T4, "auto", "merged model in fp16"),
        (EIGHT_B, RTX_4090, "4bit", "merged model in bf16"),
        (EIGHT_B, L4, "fp8", "merged model in bf16"),
        (ONE_B, T4, "4bit", "merged model in fp16"),
        (EIGHT_B, T4, "auto", "adapter on the 4-bit base"),
        (EIGHT_B, RTX_3060, "8bit", "adapter on the 8-bit base"),
        (SEVENTY_B, RTX_4090, "4bit", "adapter on the 4-bit base"),
    ],
)
def test_the_release_is_scored_at_its_own_precision_where_that_fits(
    shape: Any, device: Device, precision: str, scored: str
) -> None:
    made = planned(shape, device, hardware={"precision": precision})
    assert made.scored == scored
    assert made.at_release().precision == (made.precision if "adapter" in scored else made.compute)


def test_a_merge_that_does_not_fit_the_card_is_proven_on_the_cpu_and_never_on_a_quantised_base() -> None:
    small, large = (planned(shape, T4, hardware={"precision": "4bit"}) for shape in (ONE_B, EIGHT_B))
    assert (small.at_proof().device, small.at_proof().precision) == ("cuda", "fp16")
    assert (large.at_proof().device, large.at_proof().precision) == ("cpu", "bf16")


def test_what_needs_a_gpu_takes_no_part_in_a_proof_on_the_cpu() -> None:
    made = planned(EIGHT_B, T4, hardware={"precision": "4bit", "speedups": ["liger"]})
    assert (made.speedups, made.scoring.subject) == (("liger",), "adapter")
    assert (made.at_proof().speedups, made.at_proof().kernels) == ((), "transformers")
    assert planned(EIGHT_B, T4, hardware={"precision": "4bit"}).kernels == "fused"


def test_a_release_that_is_scored_in_another_format_than_it_is_stored_in_says_both() -> None:
    said = {stored: planned(ONE_B.model_copy(update={"stored": stored}), T4).scored for stored in ("bf16", "fp16", "")}
    assert said == {
        "bf16": "merged model in fp16, stored in bf16", "fp16": "merged model in fp16", "": "merged model in fp16"
    }  # fmt: skip


def test_answers_to_long_prompts_need_room_for_their_prompts_too() -> None:
    """Eight prompts of 16,384 tokens are one forward, whatever the size of those that score."""
    stats = data(max_length=16_384, longest_pair=512, mean_pair=512.0)
    card = Device("cuda", "of 48 GiB", 48.0, (8, 9))
    made = planned(EIGHT_B, card, stats, hardware={"precision": "4bit"})
    assert made.scoring.subject == "adapter"
    prompts = GENERATION_BATCH * stats.max_length
    alone, with_prompts = (forward_peak(EIGHT_B, "bf16", 512, "cuda", n) for n in (0, prompts))
    values = 3 * EIGHT_B.intermediate + 5 * EIGHT_B.hidden
    assert with_prompts * GIB == pytest.approx(weights_bytes(EIGHT_B, "bf16") + 2 * prompts * values)
    cache = cache_bytes(EIGHT_B, prompts) / GIB
    assert alone + cache < USABLE["cuda"] * 48 - FRAMEWORK_GIB["cuda"] < with_prompts + cache


def test_layers_compute_in_the_format_of_the_card_whatever_their_weights_are_kept_in() -> None:
    assert planned(EIGHT_B, T4).compute == "fp16"
    assert planned(EIGHT_B, RTX_3060).compute == "bf16"
    assert planned(ONE_B, T4, hardware={"precision": "fp32"}).compute == "fp32"


def test_four_bit_on_a_card_without_bf16_is_warned_of_as_the_fp16_run_that_it_is() -> None:
    told = {
        card.name: schedule_and_precision(Configuration.of_plan(planned(EIGHT_B, card)), default_bands())
        for card in (T4, RTX_3060)
    }
    assert {name: verdict.level for name, verdict in told.items()} == {T4.name: "warn", RTX_3060.name: "pass"}
    assert "fp16" in str(told[T4.name].value)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(SIZES), card=st.sampled_from([c for c in CARDS if c.capability >= (8, 9)]),
    precision=st.sampled_from(QUANTISED), longest=st.integers(64, 4096),
)  # fmt: skip
def test_what_is_scored_fits_beside_nothing_else(size: Any, card: Any, precision: str, longest: int) -> None:
    stats = data(longest_pair=longest, mean_pair=longest / 2)
    made = planned(size.shape, card.device(), stats, hardware={"precision": precision})
    usable = USABLE["cuda"] * card.memory_gib - FRAMEWORK_GIB["cuda"]
    release = made.at_release()
    assert longest <= release.token_budget <= made.token_budget
    if made.scoring.subject == "merged":
        assert release.precision == "bf16"
        assert forward_peak(size.shape, "bf16", release.token_budget, "cuda") <= usable
    else:
        assert (release.precision, release.token_budget) == (made.precision, made.token_budget)
        assert weights_bytes(size.shape, "bf16") / 2**30 > 0.6 * usable


def test_smaller_forwards_after_running_out_of_memory_are_smaller_for_scoring_too() -> None:
    made = planned(EIGHT_B, RTX_4090, hardware={"precision": "4bit"})
    smaller = made.with_half_budget()
    assert smaller is not None
    assert smaller.at_release().token_budget < made.at_release().token_budget


def test_a_plan_of_an_earlier_version_still_reads() -> None:
    values = planned(ONE_B, RTX_4090).model_dump(exclude={"half", "scoring"})
    assert TrainingPlan.model_validate(values).scored == "merged model in bf16"


def test_an_adapter_that_is_to_be_scored_must_be_given(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "output_dir": tmp_path, "fingerprint": "f", "inputs": {}, "base_model": tmp_path, "dataset": tmp_path,
        "sft_adapter": None, "policy": tmp_path, "confidence": 0.95, "generations": 0, "max_new_tokens": 1,
        "min_pairs": 1,
    }  # fmt: skip
    EvaluateSpec(**values, plan=planned(EIGHT_B, RTX_4090))
    with pytest.raises(ValidationError, match="no `adapter` is given"):
        EvaluateSpec(**values, plan=planned(EIGHT_B, T4))


def test_scoring_that_cannot_be_made_smaller_is_not_tried_again_and_says_why(tmp_path: Path) -> None:
    """Training may have had larger forwards, whose halves would be the same forwards of scoring."""
    made = planned(EIGHT_B, RTX_4090, hardware={"precision": "4bit"})
    least = made.model_copy(update={"scoring": made.scoring.model_copy(update={"token_budget": made.longest_pair})})
    specs = [
        EvaluateSpec(
            output_dir=tmp_path, fingerprint="f", inputs={}, base_model=tmp_path, dataset=tmp_path, sft_adapter=None,
            policy=tmp_path, confidence=0.95, generations=0, max_new_tokens=1, min_pairs=1, plan=plan,
        )
        for plan in (made, least)
    ]  # fmt: skip
    assert specs[0].smaller_forwards() is not None
    assert least.with_half_budget() is not None
    assert specs[1].smaller_forwards() is None
    said = given_up("evaluate", specs[1], OutOfMemory("no memory"))
    assert f"in forwards of {made.longest_pair} tokens; the longest pair alone takes that many" in said
    assert "answers take forwards of 8 prompts that no retry makes smaller" in said
    assert "set evaluation.generations below 8" in said
    assert "set hardware.precision to 4bit" not in said
