"""Greedy answers and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import GenerationConfig

from dpo_assets.checks.promotion import decide
from dpo_assets.checks.reports import AnswerHealth, GreedyAnswers
from dpo_assets.checks.statistics import wilson
from dpo_assets.contract import EvaluateSpec
from dpo_assets.planning.scoring import Scoring
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import ChatFormat
from dpo_assets.training.models.loading import attach_adapter, autocast_of, load_base
from dpo_assets.training.scoring.generation import generate, generation_health, repeats_itself
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import Settled
from dpo_assets.training.stages import evaluate
from dpo_assets.training.stages.evaluate import summarise
from dpo_assets_tests.training.conftest import Log, PlanMaker


@pytest.fixture(scope="module")
def policy(model_folder: Path, plan_for: PlanMaker, sft_adapter: Path) -> Any:
    """SFT on the packed attention, which must not take part in generation."""
    return attach_adapter(load_base(model_folder, plan_for()), plan_for(), sft_adapter, seed=0, dropout=0.0).eval()


def test_an_answer_does_not_depend_on_the_prompts_beside_it(policy: Any, chat: ChatFormat, groups: list[Group]) -> None:
    prompts = [list(group.prompt) for group in groups[:5]]
    assert len({len(prompt) for prompt in prompts}) > 1, "equal lengths would need no padding"
    together = generate(policy, prompts, chat, 12)
    alone = [generate(policy, [prompt], chat, 12)[0] for prompt in prompts]
    assert together == alone


def test_answers_take_the_best_token_of_the_plain_forward(policy: Any, chat: ChatFormat, groups: list[Group]) -> None:
    prompt = list(groups[0].prompt)
    (answer,) = generate(policy, [prompt], chat, 6)
    expected: list[int] = []
    for _ in range(6):
        with torch.no_grad():
            expected.append(int(policy(input_ids=torch.tensor([prompt + expected])).logits[0, -1].argmax()))
        if expected[-1] in chat.ends:
            break
    assert answer["ids"] == [token for token in expected if token not in chat.ends]
    assert answer["ended"] == (expected[-1] in chat.ends)


@pytest.mark.parametrize("seed", [None, 3], ids=["greedy", "sampled"])
def test_a_bases_own_generation_defaults_do_not_hide_repetition(
    policy: Any, chat: ChatFormat, groups: list[Group], seed: int | None
) -> None:
    """A `no_repeat_ngram_size` in generation_config.json made a repetition of 1 a repetition of 0 in every check."""
    prompts = [list(group.prompt) for group in groups[:4]]
    plain = generate(policy, prompts, chat, 40, seed=seed)
    holders = (policy, policy.get_base_model())
    before = [holder.generation_config for holder in holders]
    theirs = GenerationConfig(
        no_repeat_ngram_size=1, repetition_penalty=1.5, suppress_tokens=[5], min_new_tokens=9, bad_words_ids=[[7]],
        top_k=3, do_sample=True, eos_token_id=300, max_length=20,
    )  # fmt: skip
    try:
        for holder in holders:
            holder.generation_config = theirs
        assert generate(policy, prompts, chat, 40, seed=seed) == plain
        assert all(holder.generation_config is theirs for holder in holders)
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


def test_an_answer_ends_at_any_token_that_ends_a_turn(policy: Any, chat: ChatFormat, groups: list[Group]) -> None:
    """Gemma's turns end with another token than its EOS: answers ran on past the turn."""
    prompt = list(groups[0].prompt)
    (free,) = generate(policy, [prompt], chat, 12)
    end = free["ids"][5]
    forwards: list[int] = []
    counter = policy.get_base_model().register_forward_hook(lambda *_: forwards.append(1))
    (ended,) = generate(policy, [prompt], ChatFormat(chat.tokenizer, named_ends={end}), 12)
    counter.remove()
    length = free["ids"].index(end)
    assert len(forwards) == length + 1, "it stops there, and is not only cut there"
    assert (ended["ids"], ended["ended"], ended["end"]) == (free["ids"][:length], True, end)
    (cut,) = generate(policy, [prompt], chat, 3)
    assert (len(cut["ids"]), cut["ended"], cut["end"]) == (3, False, None)


def test_no_prompt_gives_no_answer_and_a_report_that_says_so(policy: Any, chat: ChatFormat) -> None:
    assert generation_health(generate(policy, [], chat, 4)) == {"answers": 0}


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


@pytest.mark.parametrize(
    ("scoring", "scored"),
    [(Scoring(), "merged model in bf16"), (Scoring(subject="adapter"), "adapter on the fp8 base")],
)
def test_a_quantised_run_is_scored_as_it_is_released_and_else_as_it_was_trained(
    scoring: Scoring, scored: str, model_folder: Path, dataset: Path, sft_adapter: Path, plan_for: PlanMaker,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The other of the two folders is not even looked at: here it does not exist."""
    gone, out = tmp_path / "gone", tmp_path / "out"
    out.mkdir()
    merged = scoring.subject == "merged"
    spec = EvaluateSpec(
        output_dir=out, fingerprint="f" * 32, inputs={}, base_model=model_folder, dataset=dataset,
        plan=plan_for(precision="fp8", scoring=scoring), sft_adapter=None, adapter=gone if merged else sft_adapter,
        policy=model_folder if merged else gone, confidence=0.95, generations=0, max_new_tokens=1, min_pairs=1,
    )  # fmt: skip
    log = Log()
    evaluate.run(spec, log)
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["scored"] == scored
    assert any(scored in message for message in log.messages)
    scores = pl.read_parquet(out / "scores.parquet")
    moved = (scores["policy_chosen"] - scores["sft_chosen"]).abs().max()
    # The built-in model is released as its own base here; the adapter is one that was trained.
    assert moved == 0.0 if merged else float(str(moved)) > 1.0
    plain = load_base(model_folder, plan_for(precision="bf16")).eval()
    groups = [dpo_group(row, spec.plan.max_length) for row in load_split(dataset, "eval")]
    with autocast_of(plan_for(precision="bf16")):
        in_16_bit, _ = score_groups(plain, groups, spec.plan.token_budget)
    assert (scores["sft_chosen"].to_list() == pytest.approx(in_16_bit[::2], abs=1e-3)) == merged


def test_the_ratio_of_likelihoods_is_the_policys_loss_over_that_of_sft() -> None:
    """Above one, chosen answers became less likely: log-probabilities of -10 and -30 went to -15 and -45."""
    table = pl.DataFrame(
        {
            "prompt_id": ["a", "b"], "source": ["x", "x"], "margin": [None, None],
            "sft_chosen": [-10.0, -30.0], "policy_chosen": [-15.0, -45.0], "chosen_tokens": [5, 10],
            "sft_rejected": [-12.0, -20.0], "policy_rejected": [-30.0, -60.0], "rejected_tokens": [6, 8],
        }
    )  # fmt: skip
    silent = AnswerHealth(answers=0)
    said = summarise(
        table,
        0.95,
        scored="merged model in fp32",
        settled=Settled("rows", "no other is exact"),
        generation=GreedyAnswers(sft=silent, policy=silent),
    )
    assert (said.kernels, said.kernels_note) == ("rows", "no other is exact")
    assert said.nll_ratio_chosen == 1.5
    assert said.chosen_shift_nats_per_token == pytest.approx((-1.0 - 1.5) / 2)
    assert said.rejected_shift_nats_per_token == pytest.approx((-3.0 - 5.0) / 2)
    assert (said.margin_mean_nats, said.margin_median_nats) == pytest.approx(((13 + 25) / 2, (13 + 25) / 2))
    assert (said.pairs, said.prompts) == (2, 2)


def test_the_scores_of_a_report_count_prompts_and_not_pairs() -> None:
    """60 prompts of 10 pairs that agree: as 600 pairs they were better than chance, as 60 prompts they are not."""
    prompts = [f"prompt {pair // 10}" for pair in range(600)]
    skill = [1.0 if pair // 10 < 35 else -1.0 for pair in range(600)]
    table = pl.DataFrame(
        {
            "prompt_id": prompts, "source": ["good"] * 300 + ["bad"] * 300, "margin": [1.0] * 450 + [2.0] * 150,
            "sft_chosen": [-10.0] * 600, "sft_rejected": [-10.0] * 600, "chosen_tokens": [5] * 600,
            "policy_chosen": [-10.0 + 5 * s for s in skill], "policy_rejected": [-10.0] * 600,
            "rejected_tokens": [6 if s > 0 else 4 for s in skill],
        }
    )  # fmt: skip
    silent = AnswerHealth(answers=0)
    said = summarise(
        table,
        0.95,
        scored="merged model in fp32",
        settled=Settled("rows", ""),
        generation=GreedyAnswers(sft=silent, policy=silent),
    )
    assert (said.pairs, said.prompts) == (600, 60)
    scores = (said.implicit_reward_accuracy, said.logp_accuracy_policy, said.pick_the_longer)
    assert all(score.clusters == 60 and (score.effective or 0) < 61 for score in scores)
    assert said.implicit_reward_accuracy.low < 0.5 < wilson(350, 600).low
    assert decide(said, 50)[0] == "hold"
    assert said.reward_against_chance is not None
    assert (said.reward_against_chance.clusters, said.reward_against_chance.p_better > 0.1) == (60, True)
    assert said.reward_against_chance.difference == pytest.approx(35 / 60 - 0.5)
    assert said.logp_against_sft is not None
    assert said.logp_against_sft.difference == pytest.approx(
        said.logp_accuracy_policy.value - said.logp_accuracy_sft.value
    )
    assert said.margin is not None
    assert (said.margin.value, said.margin.clusters) == (said.margin_mean_nats, 60)
    assert said.margin.low is not None
    assert said.margin.low < 0.0 < said.margin.value
    told = {(part.by, part.name): part for part in said.slices}
    sizes = [(by, part.reward.n) for (by, _), part in told.items()]
    assert sizes == [
        ("source", 300),
        ("source", 300),
        ("margin", 450),
        ("margin", 150),
    ]
    assert (told["source", "good"].reward.value, told["source", "bad"].reward.value) == pytest.approx((1.0, 1 / 6))
    assert told["source", "bad"].reward.clusters == told["source", "bad"].against_sft.clusters == 30
    assert told["source", "bad"].against_sft.high < 0 < told["source", "good"].against_sft.low
