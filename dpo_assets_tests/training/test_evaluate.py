"""Greedy answers and what is said about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from dpo_assets.training.evaluate import generate, generation_health, repeats_itself, summarise
from dpo_assets.training.loading import attach_adapter, load_base
from dpo_assets.training.packing import Group
from dpo_assets_tests.training.conftest import PlanMaker


@pytest.fixture(scope="module")
def policy(model_folder: Path, plan_for: PlanMaker, sft_adapter: Path) -> Any:
    """SFT on the packed attention, which must not take part in generation."""
    return attach_adapter(load_base(model_folder, plan_for()), plan_for(), sft_adapter, seed=0, dropout=0.0).eval()


def test_an_answer_does_not_depend_on_the_prompts_beside_it(policy: Any, tokenizer: Any, groups: list[Group]) -> None:
    prompts = [list(group.prompt) for group in groups[:5]]
    assert len({len(prompt) for prompt in prompts}) > 1, "equal lengths would need no padding"
    together = generate(policy, prompts, tokenizer, 12)
    alone = [generate(policy, [prompt], tokenizer, 12)[0] for prompt in prompts]
    assert together == alone


def test_answers_take_the_best_token_of_the_plain_forward(policy: Any, tokenizer: Any, groups: list[Group]) -> None:
    prompt = list(groups[0].prompt)
    (answer,) = generate(policy, [prompt], tokenizer, 6)
    expected: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            expected.append(int(policy(input_ids=torch.tensor([prompt + expected])).logits[0, -1].argmax()))
        if expected[-1] == tokenizer.eos_token_id:
            break
    assert answer["ids"] == [token for token in expected if token != tokenizer.eos_token_id]
    assert answer["ended"] == (tokenizer.eos_token_id in expected)


def test_no_prompt_gives_no_answer_and_a_report_that_says_so(policy: Any, tokenizer: Any) -> None:
    assert generation_health(generate(policy, [], tokenizer, 4)) == {"answers": 0}


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [
        ([], False),
        ([1, 2, 3], False),
        ([1, 2, 3, 4] * 2, False),
        ([1, 2, 3, 4] * 3, True),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4, 8, 1, 2, 3, 4], True),
        ([7] * 5, False),
        ([7] * 6, True),
        (list(range(100)), False),
    ],
)
def test_an_answer_repeats_itself_when_four_tokens_stand_three_times(ids: list[int], repeats: bool) -> None:
    assert repeats_itself(ids) is repeats


def test_generation_health_counts_shares() -> None:
    answers: list[dict[str, Any]] = [
        {"ids": [1, 2, 3, 4] * 3, "text": "", "ended": False},
        {"ids": [5, 6], "text": "", "ended": True},
        {"ids": [], "text": "", "ended": True},
        {"ids": [5, 6], "text": "", "ended": True},
    ]
    health = generation_health(answers)
    assert health == {
        "answers": 4,
        "repetition": 0.25,
        "no_eos": 0.25,
        "empty": 0.25,
        "distinct_2": pytest.approx(5 / 13),
        "mean_tokens": 4.0,
    }


def test_the_ratio_of_likelihoods_is_the_policys_loss_over_that_of_sft() -> None:
    """Above one, chosen answers became less likely: log-probabilities of -10 and -30 went to -15 and -45."""
    table = pl.DataFrame(
        {
            "prompt_id": ["a", "b"],
            "sft_chosen": [-10.0, -30.0], "policy_chosen": [-15.0, -45.0], "chosen_tokens": [5, 10],
            "sft_rejected": [-12.0, -20.0], "policy_rejected": [-30.0, -60.0], "rejected_tokens": [6, 8],
        }
    )  # fmt: skip
    said = summarise(table, 0.95)
    assert said["nll_ratio_chosen"] == 1.5
    assert said["chosen_shift_nats_per_token"] == pytest.approx((-1.0 - 1.5) / 2)
    assert said["rejected_shift_nats_per_token"] == pytest.approx((-3.0 - 5.0) / 2)
    assert (said["margin_mean_nats"], said["margin_median_nats"]) == pytest.approx(((13 + 25) / 2, (13 + 25) / 2))
    assert (said["pairs"], said["prompts"]) == (2, 2)
