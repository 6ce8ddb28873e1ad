"""Greedy answers and what is said about them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import GenerationConfig

from dpo_assets.artifact import VOLATILE
from dpo_assets.checks.evidence.candidate import ScoredPairs
from dpo_assets.checks.instructions import INSTRUCTIONS
from dpo_assets.checks.neutral import read_texts
from dpo_assets.checks.reports import (
    AnswerHealth,
    Divergence,
    EvaluationReport,
    GreedyAnswers,
    InstructionsFollowed,
    NotMeasured,
    Perplexity,
)
from dpo_assets.checks.statistics import wilson
from dpo_assets.contract import ChampionSpec, EvaluateSpec, TemplateSettings
from dpo_assets.errors import ConfigError
from dpo_assets.planning.scoring import Scoring
from dpo_assets.training.batches.data import dpo_group, first_asked, load_asked, load_split
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.evaluation import subjects
from dpo_assets.training.evaluation.summary import Opponent, summarise
from dpo_assets.training.models.chat_format import ChatFormat, load_chat_format
from dpo_assets.training.models.loading import attach_adapter, autocast_of, load_base
from dpo_assets.training.scoring.divergence import own_answers
from dpo_assets.training.scoring.generation import generate, generation_health, longest_repeat, repeats_itself
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import Settled
from dpo_assets.training.stages import evaluate
from dpo_assets.training.stages.rereading import CUT_FOR_ONE, reread
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
        {"ids": [1, 2, 3, 4] * 3, "text": "", "ended": False, "marked": True},
        {"ids": [5, 6], "text": "", "ended": True, "marked": False},
        {"ids": [], "text": "", "ended": True, "marked": False},
        {"ids": [5, 6], "text": "", "ended": True, "marked": False},
    ]
    health = generation_health(answers)
    assert health == {
        "answers": 4,
        "repetition": 0.25,
        "no_eos": 0.25,
        "empty": 0.25,
        "distinct_1": pytest.approx(6 / 16),
        "distinct_2": pytest.approx(5 / 13),
        "longest_repeat": pytest.approx(8 / 12 / 4),
        "marks": 0.25,
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
            "group_id": ["a", "b"], "source": ["x", "x"], "margin": [None, None],
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


def test_the_scores_of_a_report_count_conversations_and_neither_turns_nor_pairs() -> None:
    """60 conversations of 10 turns that agree: as 600 prompts they were better than chance, as 60 they are not."""
    conversations = [f"conversation {pair // 10}" for pair in range(600)]
    skill = [1.0 if pair // 10 < 35 else -1.0 for pair in range(600)]
    table = pl.DataFrame(
        {
            "prompt_id": [f"turn {n}" for n in range(600)], "group_id": conversations,
            "source": ["good"] * 300 + ["bad"] * 300, "margin": [1.0] * 450 + [2.0] * 150,
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


@pytest.mark.parametrize(
    ("ids", "tokens"),
    [([], 0), ([1], 0), ([1, 2], 0), ([1, 1], 1), ([1, 2, 3, 1, 2], 2), ([1, 2, 1, 2, 1], 3), ([4, 4, 4, 4], 3)],
)
def test_the_longest_repeat_is_that_of_the_longest_run_that_stands_twice(ids: list[int], tokens: int) -> None:
    assert longest_repeat(ids) == tokens


def test_an_answer_with_a_mark_of_a_template_is_marked(policy: Any, chat: ChatFormat, groups: list[Group]) -> None:
    """Special tokens do not stand in the text, so only the ids show them."""
    prompt = list(groups[0].prompt)
    (answer,) = generate(policy, [prompt], chat, 6)
    assert answer["marked"] is False
    special = ChatFormat(chat.tokenizer)
    special.__dict__["special_ids"] = frozenset(answer["ids"][2:3])
    (marked,) = generate(policy, [prompt], special, 6)
    assert (marked["marked"], marked["ids"]) == (True, answer["ids"])


EvaluateMaker = Callable[..., EvaluateSpec]
WORDIER = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}>\n{% endfor %}"
REFUSING = "{% if messages[0].content == STOP %}{{ raise_exception('not that') }}{% endif %}" + WORDIER


@pytest.fixture(scope="module")
def evaluation(model_folder: Path, dataset: Path, sft_adapter: Path, plan_for: PlanMaker) -> EvaluateMaker:
    """Specs of an evaluation whose policy is the built-in model and whose start is a trained adapter on it."""

    def make(out: Path, **changes: Any) -> EvaluateSpec:
        out.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            "output_dir": out, "fingerprint": "f" * 32, "base_model": model_folder, "dataset": dataset,
            "inputs": {"base_model": "b", "sft_checkpoint": "s", "dpo_adapter": "a", "merged_model": "m"},
            "plan": plan_for(), "sft_adapter": sft_adapter, "adapter": None, "policy": model_folder, "confidence": 0.95,
            "generations": 2, "max_new_tokens": 3, "min_pairs": 1,
        }  # fmt: skip
        return EvaluateSpec(**values | changes)

    return make


def champion(base: Path, trained: Path, **changes: Any) -> ChampionSpec:
    """A champion that is the trained adapter's policy, and started from the base as it is."""
    values: dict[str, Any] = {
        "name": "c" * 64, "base_model": base, "sft_adapter": None, "adapter": trained, "policy": base,
        "same_start": False,
        "inputs": {"base_model": "b", "sft_checkpoint": "other", "dpo_adapter": "other", "merged_model": "other"},
    }  # fmt: skip
    return ChampionSpec(**values | changes)


def scored(spec: EvaluateSpec) -> tuple[pl.DataFrame, EvaluationReport, Log]:
    log = Log()
    evaluate.run(spec, log)
    report = EvaluationReport.model_validate_json((spec.output_dir / "report.json").read_bytes())
    return pl.read_parquet(spec.output_dir / "scores.parquet"), report, log


# --- neutral texts ------------------------------------------------------------------------------------------------


def test_neutral_texts_are_scored_as_the_plain_forward_scores_them(
    evaluation: EvaluateMaker, model_folder: Path, sft_adapter: Path, chat: ChatFormat, tmp_path: Path
) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("Once there was a dog.\nIt ran.\n\n\nThe sun was hot. " + "A cat sat. " * 90, encoding="utf-8")
    spec = evaluation(tmp_path / "out", corpus=corpus, champion=champion(model_folder, sft_adapter))
    _, report, _ = scored(spec)
    assert isinstance(report.neutral, Perplexity)
    begin, limit = chat.tokenizer.bos_token_id, spec.plan.max_length
    rows = [
        [begin, *chat.tokenizer(text, add_special_tokens=False)["input_ids"]][:limit] for text in read_texts(corpus)
    ]
    assert len(rows[1]) == limit, "the second one is cut"
    start = attach_adapter(load_base(model_folder, spec.plan), spec.plan, sft_adapter, seed=0, dropout=0.0).eval()
    for model, told in (
        (start, report.neutral.sft),
        (load_base(model_folder, spec.plan).eval(), report.neutral.policy),
    ):
        nats = 0.0
        for row in rows:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
            nats -= float(logits[range(len(row) - 1), row[1:]].sum())
        assert told == pytest.approx(math.exp(nats / sum(len(row) - 1 for row in rows)), rel=1e-3)
    assert report.neutral.ratio == pytest.approx(report.neutral.policy / report.neutral.sft)
    assert (report.neutral.texts, report.neutral.tokens) == (2, sum(len(row) - 1 for row in rows))
    # The champion's merged model and its start are the same built-in one here.
    assert report.champion_scores is not None
    assert isinstance(report.champion_scores.neutral, Perplexity)
    assert report.champion_scores.neutral.ratio == 1.0


# --- how far the release went -------------------------------------------------------------------------------------


def test_the_kl_of_the_release_is_the_log_ratio_of_its_own_answers(
    evaluation: EvaluateMaker, dataset: Path, model_folder: Path, sft_adapter: Path, chat: ChatFormat, tmp_path: Path
) -> None:
    """Sampled by the merged model, here the built-in one, and scored by its plain forward and by its start's."""
    spec = evaluation(tmp_path / "out", sampled_answers=4, max_new_tokens=8, generations=1)
    _, report, _ = scored(spec)
    plain = load_base(model_folder, spec.plan).eval()
    start = attach_adapter(load_base(model_folder, spec.plan), spec.plan, sft_adapter, seed=0, dropout=0.0).eval()
    rows = load_asked(dataset, "eval", tmp_path / "scratch", ["prompt_id"])
    prompts = [ids for _, ids in first_asked(rows, chat, 4, spec.plan.max_length - 8, by="prompt_id")]
    answers = own_answers(prompts, generate(plain, prompts, chat, 8, seed=spec.plan.dpo.seed))
    assert len(answers) == 4
    ratios = []
    for group in answers:
        row = torch.tensor([[*group.prompt, *group.completions[0]]])
        with torch.no_grad():
            by_both = [model(input_ids=row).logits[0, :-1].log_softmax(-1) for model in (plain, start)]
        wanted = row[0, len(group.prompt) :]
        scores = [float(logps[len(group.prompt) - 1 :].gather(-1, wanted[:, None]).sum()) for logps in by_both]
        ratios.append(scores[0] - scores[1])
    tokens = sum(len(group.completions[0]) for group in answers)
    assert isinstance(report.kl, Divergence)
    assert report.kl.per_token == pytest.approx(sum(ratios) / tokens, abs=1e-3)
    assert report.kl.per_token > 0.05
    assert report.kl.low is not None
    assert report.kl.low < report.kl.per_token


def test_a_release_whose_kl_nobody_asked_for_says_so(evaluation: EvaluateMaker, tmp_path: Path) -> None:
    _, report, _ = scored(evaluation(tmp_path / "out", generations=0))
    assert isinstance(report.kl, NotMeasured)
    assert isinstance(report.neutral, NotMeasured)
    assert isinstance(report.instructions, NotMeasured)


def test_instructions_are_answered_greedily_as_a_user_asks_them(
    evaluation: EvaluateMaker, model_folder: Path, chat: ChatFormat, tmp_path: Path
) -> None:
    spec = evaluation(tmp_path / "out", generations=1, instructions=2)
    scored(spec)
    told = json.loads((spec.output_dir / "instructions.json").read_text(encoding="utf-8"))
    prompts = [chat.prompt_ids([{"role": "user", "content": one.prompt}]) for one in INSTRUCTIONS[:2]]
    said = generate(load_base(model_folder, spec.plan).eval(), prompts, chat, spec.max_new_tokens)
    assert [row["policy"] for row in told] == [answer["text"] for answer in said]
    assert len(json.loads((spec.output_dir / "generations.json").read_text(encoding="utf-8"))) == 1


# --- the champion, scored again on the pairs of now ---------------------------------------------------------------


def test_the_champion_is_scored_on_the_same_pairs_against_its_own_start(
    evaluation: EvaluateMaker, model_folder: Path, sft_adapter: Path, plan_for: PlanMaker, tmp_path: Path
) -> None:
    """Here the champion is the challenger's own adapter, so nothing may differ."""
    on_base = plan_for(scoring=Scoring(subject="adapter"))
    spec = evaluation(
        tmp_path / "out", plan=on_base, sft_adapter=None, adapter=sft_adapter, policy=tmp_path / "gone",
        champion=champion(model_folder, sft_adapter, policy=tmp_path / "gone"), sampled_answers=3, instructions=2,
    )  # fmt: skip
    table, report, _ = scored(spec)
    for column in ("chosen", "rejected"):
        assert table[f"champion_{column}"].to_list() == table[f"policy_{column}"].to_list()
        assert table[f"champion_start_{column}"].to_list() == table[f"sft_{column}"].to_list()
        assert table[f"champion_{column}_tokens"].to_list() == table[f"{column}_tokens"].to_list()
    assert (table["champion_chosen"] - table["champion_start_chosen"]).abs().max() > 1.0
    assert report.champion == "c" * 64
    theirs = report.champion_scores
    assert theirs is not None
    assert theirs.implicit_reward_accuracy == report.implicit_reward_accuracy
    assert theirs.logp_accuracy == report.logp_accuracy_policy
    assert isinstance(report.kl, Divergence)
    assert report.kl.per_token > 0.05
    assert (theirs.kl, theirs.chosen, theirs.margin) == (report.kl, report.chosen, report.margin)
    assert theirs.reward_accuracy_per_token == report.reward_accuracy_per_token
    assert (theirs.reward_against.difference, theirs.reward_against.discordant, theirs.left_out) == (0.0, 0, {})
    said = json.loads((spec.output_dir / "generations.json").read_text(encoding="utf-8"))
    assert all(set(row) == {"prompt", "sft", "policy", "champion"} for row in said)
    assert [row["champion"] for row in said] == [row["policy"] for row in said]
    assert report.generation.champion == report.generation.policy
    told = json.loads((spec.output_dir / "instructions.json").read_text(encoding="utf-8"))
    assert [(row["name"], row["champion"]) for row in told] == [(one["name"], one["policy"]) for one in told]
    assert isinstance(report.instructions, InstructionsFollowed)
    asked = {one.name: one for one in INSTRUCTIONS}
    assert report.instructions.by_instruction == tuple(
        (row["name"], *(asked[row["name"]].followed_by(row[who]) for who in ("sft", "policy", "champion")))
        for row in told
    )
    assert (len(told), report.instructions.policy.n) == (2, 2)


def test_a_start_that_both_share_is_scored_once(
    evaluation: EvaluateMaker, model_folder: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    shared = champion(model_folder, sft_adapter, sft_adapter=sft_adapter, same_start=True)
    table, report, log = scored(evaluation(tmp_path / "out", champion=shared, sampled_answers=3))
    assert table["champion_start_chosen"].to_list() == table["sft_chosen"].to_list()
    done = [line for line in log.messages if line.startswith("[progress]")]
    assert done == [
        "[progress] evaluate 1/3 policy done",
        "[progress] evaluate 2/3 champion done",
        "[progress] evaluate 3/3 SFT done",
    ]
    assert report.champion_scores is not None
    # It heard both: policy and champion are the built-in model here, so they say the same with the same seed.
    assert isinstance(report.kl, Divergence)
    assert report.champion_scores.kl == report.kl


def test_scores_of_pairs_scored_before_are_read_and_only_new_pairs_are_computed(
    evaluation: EvaluateMaker, dataset: Path, model_folder: Path, sft_adapter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Seven pairs first; a refresh brings three more. The policy of then is the champion of now."""
    cache, earlier = tmp_path / "scores.sqlite", tmp_path / "earlier"
    earlier.mkdir()
    pairs = pl.read_parquet(dataset / "eval.parquet")
    pairs.head(7).write_parquet(earlier / "eval.parquet")
    first, _, _ = scored(evaluation(tmp_path / "first", dataset=earlier, score_cache=cache))
    asked: list[int] = []
    real = subjects.score_groups

    def counted(model: Any, groups: Any, *more: Any) -> Any:
        asked.extend([len(groups)] if groups else [])
        return real(model, groups, *more)

    monkeypatch.setattr(subjects, "score_groups", counted)
    was_live = champion(
        model_folder, sft_adapter, sft_adapter=sft_adapter, same_start=True, inputs={"merged_model": "m"}
    )
    changed = {"base_model": "b", "sft_checkpoint": "s", "dpo_adapter": "a2", "merged_model": "m2"}
    spec = evaluation(tmp_path / "second", score_cache=cache, inputs=changed, champion=was_live)
    table, _, log = scored(spec)
    assert asked == [10, 3, 3]
    assert table["sft_chosen"][:7].to_list() == first["sft_chosen"].to_list()
    assert table["champion_chosen"][:7].to_list() == first["policy_chosen"].to_list()
    assert any("scored by the champion, 7 of them before" in line for line in log.messages)
    again, _, _ = scored(evaluation(tmp_path / "anew", inputs=changed, champion=was_live))
    for column in table.columns:
        if column.endswith(("chosen", "rejected")):
            assert table[column].to_list() == pytest.approx(again[column].to_list(), abs=1e-3)
    kept = json.loads((spec.output_dir / VOLATILE).read_text(encoding="utf-8"))
    assert [kept[f"{who}_pairs_from_cache"] for who in ("sft", "policy", "champion")] == [7, 0, 7]


def test_a_champion_of_another_base_is_asked_in_its_own_template_and_pairs_it_refuses_are_counted(
    evaluation: EvaluateMaker, dataset: Path, model_folder: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    other, pairs = tmp_path / "other", pl.read_parquet(dataset / "eval.parquet")
    shutil.copytree(model_folder, other)
    refused = pairs["prompt"][0].to_list()[0]["content"]
    (other / "chat_template.jinja").write_text(REFUSING.replace("STOP", json.dumps(refused)), encoding="utf-8")
    theirs = champion(other, sft_adapter, policy=other)
    with_another = evaluation(tmp_path / "out", champion=theirs)
    table, report, log = scored(with_another)
    assert report.champion_scores is not None
    left_out = report.champion_scores.left_out
    assert left_out["template_refused"] == sum(row[0]["content"] == refused for row in pairs["prompt"].to_list())
    assert table.height == report.pairs == pairs.height - sum(left_out.values())
    assert pairs["pair_id"][0] not in table["pair_id"]
    assert any(f"{left_out['template_refused']} template_refused" in line for line in log.messages)
    # The champion's merged model is the built-in one, and so is the policy: their scores differ by the template alone.
    assert table["champion_chosen"].to_list() != pytest.approx(table["policy_chosen"].to_list(), abs=1.0)
    chat, row = load_chat_format(other), pairs.filter(pairs["pair_id"] == table["pair_id"][0]).row(0, named=True)
    [text] = chat.texts([row["prompt"] + row["chosen"]], answer_follows=False)
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"][: with_another.plan.max_length]
    prompt = len(chat.prompt_ids(row["prompt"]))
    plain = load_base(model_folder, with_another.plan).eval()
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    by_row = logits[range(len(ids) - 1), ids[1:]][prompt - 1 :].sum()
    assert table["champion_chosen"][0] == pytest.approx(float(by_row), abs=1e-2)


def test_an_answer_that_is_cut_for_the_champion_alone_is_asked_of_nobody(
    dataset: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Its template is wordier, so its rows end before those of the challenger."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    (other / "chat_template.jinja").write_text(WORDIER, encoding="utf-8")
    sizes = [pl.col(name).list.len().cast(pl.Int64) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    longest = sizes[0] + pl.max_horizontal(sizes[1:])
    pair = pl.read_parquet(dataset / "eval.parquet").sort(longest).head(1)
    fits = pair.select(longest).item()
    assert fits < 250, "the model reads 512 tokens"
    found = reread(pair, other, TemplateSettings(), fits)
    assert (dict(found.left_out), dict(found.groups)) == ({CUT_FOR_ONE: 1}, {})
    for room in (fits - 1, fits + 200):  # Cut for both, and for neither.
        found = reread(pair, other, TemplateSettings(), room)
        assert (dict(found.left_out), list(found.groups)) == ({}, pair["pair_id"].to_list())


def test_the_champion_is_held_against_its_own_start_and_its_own_tokens() -> None:
    """By the policy's start, or by its count of tokens, the champion would rank other pairs well."""
    table = pl.DataFrame(
        {
            "group_id": list("abcd"), "source": ["x", "x", "y", "y"], "margin": [None] * 4,
            "sft_chosen": [-9.0, -9.0, -9.0, -9.0], "sft_rejected": [-9.0, -9.0, -9.0, -9.0],
            "policy_chosen": [-8.0, -8.0, -8.0, -9.5], "policy_rejected": [-9.0, -9.0, -9.0, -9.0],
            "chosen_tokens": [4] * 4, "rejected_tokens": [4] * 4,
            "champion_chosen": [-8.0, -8.0, -8.0, -8.0], "champion_rejected": [-9.0, -9.0, -9.0, -9.0],
            "champion_start_chosen": [-6.0, -6.0, -6.0, -9.0], "champion_start_rejected": [-9.0, -9.0, -9.0, -9.0],
            "champion_chosen_tokens": [2] * 4, "champion_rejected_tokens": [4] * 4,
        }
    )  # fmt: skip
    silent = AnswerHealth(answers=0)
    said = summarise(
        table, 0.95, scored="merged model in fp32", settled=Settled("rows", ""),
        generation=GreedyAnswers(sft=silent, policy=silent), opponent=Opponent("c", {"template_refused": 2}),
    )  # fmt: skip
    held = said.champion_scores
    assert held is not None
    assert (said.implicit_reward_accuracy.value, held.implicit_reward_accuracy.value) == (0.75, 0.25)
    assert (said.logp_accuracy_policy.value, held.logp_accuracy.value) == (0.75, 0.0)
    assert (held.reward_against.difference, held.reward_against.discordant) == (0.5, 4)
    assert (held.logp_against.difference, held.left_out) == (0.75, {"template_refused": 2})
    parts = [(part.name, part.champion, part.against_champion) for part in said.slices]
    shown = [(name, own and own.value, less and (less.difference, less.discordant)) for name, own, less in parts]
    assert shown == [("x", 0.0, (1.0, 2)), ("y", 0.5, (0.0, 2))]
    assert held.chosen is not None
    assert held.chosen.tokens == 8, "of its own tokens, two an answer"
    assert held.chosen.ratio == pytest.approx(math.exp((32 - 27) / 8))


def test_a_reward_by_token_is_no_reward_for_length() -> None:
    """Every answer gained a nat a token, so whichever is longer gained more; by token the two are alike."""
    table = {
        "sft_chosen": [-40.0, -10.0, -10.0], "policy_chosen": [-20.0, -5.0, -4.0], "chosen_tokens": [20, 5, 5],
        "sft_rejected": [-10.0, -40.0, -40.0], "policy_rejected": [-5.0, -20.0, -20.0], "rejected_tokens": [5, 20, 20],
    }  # fmt: skip
    pairs = ScoredPairs(list("abc"), {name: [float(x) for x in values] for name, values in table.items()})
    assert pairs.reward_wins() == [1.0, 0.0, 0.0]
    assert pairs.reward_wins_per_token() == [0.5, 0.5, 1.0]


def test_a_champion_that_can_be_asked_nothing_stops_the_evaluation_by_name(
    evaluation: EvaluateMaker, model_folder: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    (other / "chat_template.jinja").write_text(REFUSING.replace("== STOP", "| length > 15"), encoding="utf-8")
    spec = evaluation(tmp_path / "out", champion=champion(other, sft_adapter, policy=other))
    with pytest.raises(ConfigError, match=r"cccccccccccc reads none of the 10 held-out pairs \(10 template_refused\)"):
        evaluate.run(spec, Log())
