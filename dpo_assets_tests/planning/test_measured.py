"""Estimates beside what was measured: peaks within 15 %, pairs a second within 25 %, and engines in their order."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import pytest

from dpo_assets.planning.cards import find_card
from dpo_assets.planning.memory import FRAMEWORK_GIB
from dpo_assets.planning.plan import DatasetStats, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.sizes import find_model
from dpo_assets_tests.planning.measured import BLOCKS, PAIRS, Block
from dpo_assets_tests.samples import recipe

PEAK_TOLERANCE, SPEED_TOLERANCE = 0.15, 0.25
# Unsloth's Gemma 3 computes its windows by masks, which the prediction does not count: 24 and 28 % too fast.
MASKED, MASKED_TOLERANCE = ("gemma3-4b", "unsloth"), 0.3
TOLD_APART = 1.1  # Two arms of a row within a tenth of one another are not in any order: repeats differ as much.


def predicted(block: Block) -> float:
    seconds = block.training.seconds(block.work, block.budget, block.recomputed, find_card(block.card))
    return PAIRS / seconds


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.peak_gib], ids=lambda block: block.label)
def test_the_estimated_peak_is_within_15_percent_of_the_measured_one(block: Block) -> None:
    assert block.peak_gib is not None
    # What a forward of whole pairs holds: the planner plans with no more.
    held = block.work.whole_pairs(block.budget) if block.trainer == "packed" else block.budget
    assert block.training.peak(held, block.recomputed) == pytest.approx(block.peak_gib, rel=PEAK_TOLERANCE)


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.cap_gib and b.trainer == "packed" and not b.one_scratch],
    ids=lambda block: block.label,
)
def test_every_plan_that_ran_under_its_cap_is_one_that_fits_it(block: Block) -> None:
    assert block.cap_gib is not None
    assert block.training.needed(block.budget, block.recomputed) <= block.training.usable(block.cap_gib)
    assert block.peak_gib is not None
    assert block.peak_gib + FRAMEWORK_GIB["cuda"] <= block.cap_gib


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.label)
def test_predicted_pairs_per_second_are_within_25_percent_of_the_measured_ones(block: Block) -> None:
    tolerance = MASKED_TOLERANCE if (block.model, block.kernels) == MASKED else SPEED_TOLERANCE
    assert predicted(block) == pytest.approx(block.pairs_per_s, rel=tolerance)


def test_in_every_row_the_engines_are_predicted_in_their_measured_order() -> None:
    rows: dict[tuple[object, ...], list[Block]] = defaultdict(list)
    for block in BLOCKS:
        rows[block.model, block.precision, block.cap_gib, block.card, block.mean_pair].append(block)
    compared = 0
    for arms in rows.values():
        for one, other in combinations(arms, 2):
            slow, fast = sorted((one, other), key=lambda block: block.pairs_per_s)
            if (one.kernels, one.trainer) != (other.kernels, other.trainer) and (
                fast.pairs_per_s > TOLD_APART * slow.pairs_per_s
            ):
                assert predicted(fast) > predicted(slow), (fast.label, slow.label)
                compared += 1
    assert compared > 20


def test_a_quantised_base_is_given_few_large_forwards() -> None:
    """Llama-8B in 4 bit under 10.3 GiB on an H200: 14.8 pairs/s in forwards of 5,248 tokens, 10.4 in ones of 1,984."""
    shape, device = find_model("8b").shape, Device("cuda", "NVIDIA H200", 10.3, (9, 0))
    data = DatasetStats(train_pairs=48, eval_pairs=0, max_length=1_024, longest_pair=1_892, mean_pair=841.8)
    settings = {"dpo": {"batch_size": 16, "beta": 0.1}, "sft": {"strategy": "adopt"}}
    plan = make_plan(recipe(**settings, hardware={"precision": "4bit"}), shape, data, device)
    assert plan.token_budget > 4_000
