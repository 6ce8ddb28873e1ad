"""RewardBench's files: read, scored by the worker, and counted as RewardBench itself counts."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dpo_assets.assets.scorers_ahead import refuse_scorers
from dpo_assets.checks.benchmarks import benchmark_verdicts
from dpo_assets.checks.evidence.measured import MeanScore
from dpo_assets.checks.reports import BenchmarkScores
from dpo_assets.contract import QUESTION, BenchmarkFile, BenchmarkSpec
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.pair import prompt_ids
from dpo_assets.feedback.trained import TRAINED_GROUPS
from dpo_assets.judging.questions import LeftOut, Question, read_questions
from dpo_assets.judging.rewardbench import SECTIONS, Answered, credit, summarise, ties_score, weighted
from dpo_assets.recipe import parse_recipe, resolve_paths
from dpo_assets.resources.hub import HubResource
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.stages import benchmark
from dpo_assets_tests.pipelines import STORIES, demo_recipe, failed_checks, failures, materialize, metadata
from dpo_assets_tests.samples import benchmark_scores, plan, recipe, user
from dpo_assets_tests.test_lineage import ORDER, Shelf

ON_CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32", "max_length": 96, "token_budget": 256}


class Log:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str) -> None:
        self.messages.append(message)


def first_row(**changes: Any) -> dict[str, Any]:
    """A row of RewardBench."""
    row = {"prompt": "What is a cat?", "chosen": "An animal.", "rejected": "A stone.", "subset": "easy", "id": 7}
    return row | changes


def second_row(**changes: Any) -> dict[str, Any]:
    """A row of RewardBench 2."""
    row = {
        "id": "7",
        "prompt": "What is a cat?",
        "chosen": ["An animal."],
        "rejected": ["A stone.", "A car.", "No."],
        "num_correct": 1,
        "subset": "Focus",
    }
    return row | changes


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "format_", "right", "wrong"),
    [
        (first_row(), "rewardbench", ("An animal.",), ("A stone.",)),
        (second_row(), "rewardbench2", ("An animal.",), ("A stone.", "A car.", "No.")),
        (
            first_row(
                prompt=[user("What is a cat?")],
                chosen=[user("What is a cat?"), {"role": "assistant", "content": "An animal."}],
                rejected=[{"role": "assistant", "content": "A stone."}],
            ),
            "rewardbench",
            ("An animal.",),
            ("A stone.",),
        ),
    ],
    ids=["first", "second", "messages"],
)
def test_a_file_is_read_whichever_of_the_formats_it_has(
    row: dict[str, Any], format_: str, right: tuple[str], wrong: tuple[str], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        lines(path, [row, row | {"id": 8}])
    else:
        pl.DataFrame([row, row | {"id": type(row["id"])(8)}]).write_parquet(path)
    found = read_questions(path, "auto")
    assert (found.format, found.left_out, len(found.asked)) == (format_, (), 2)
    one = found.asked[0]
    assert (one.right, one.wrong, one.subset, one.name) == (right, wrong, row["subset"], "7")
    assert list(one.prompt) == [user("What is a cat?")]


BAD = [
    ("no_prompt", {"prompt": None}),
    ("no_answer", {"chosen": []}),
    ("no_answer", {"rejected": "A stone."}),
    ("no_answer", {"chosen": ["An animal.", None]}),
    ("no_preference", {"rejected": ["A stone.", "An animal."]}),
    ("bad_row", {"num_correct": 2}),
    ("bad_row", {"chosen": ["An animal.", "A pet."], "num_correct": 2}),
    ("bad_row", {"subset": "Ties", "id": "7"}),
    ("bad_row", {"subset": "Ties", "id": "tied:7"}),
    ("bad_row", {"subset": "ties", "id": "ref:7", "chosen": ["An animal.", "A pet."], "num_correct": 2}),
]


@pytest.mark.parametrize(("reason", "changes"), BAD, ids=lambda value: str(value))
def test_a_row_that_cannot_be_asked_is_left_out_with_its_number_and_reason(
    reason: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    found = read_questions(lines(tmp_path / "rows.jsonl", [second_row(), second_row(**changes)]), "auto")
    assert [(row.number, row.reason) for row in found.left_out] == [(2, reason)]
    assert [question.number for question in found.asked] == [1]


def test_a_second_row_of_ties_with_the_same_id_is_not_lost(tmp_path: Path) -> None:
    tied = second_row(subset="Ties", id="ref:1")
    found = read_questions(lines(tmp_path / "rows.jsonl", [tied, tied]), "auto")
    assert [(row.number, row.reason) for row in found.left_out] == [(2, "duplicate_id")]


_values = st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=4), max_size=3)
_rows = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "subset", "id", "num_correct"]), _values)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(_rows | st.sampled_from([first_row(), second_row()]), max_size=6))
def test_every_row_is_asked_or_left_out_whatever_it_holds(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", [*rows, first_row()])
    found = read_questions(path, "rewardbench")
    numbers = [question.number for question in found.asked] + [row.number for row in found.left_out]
    assert sorted(numbers) == list(range(1, len(rows) + 2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such file"),
        ('{"prompt": "a", "chosen": 5}\n', r"no text and no list.*row 1"),
        ('{"question": "a"}\n', "no row of the benchmark"),
        ("", "it holds no row"),
    ],
    ids=["missing", "numbers", "other columns", "empty"],
)
def test_a_file_of_which_nothing_can_be_asked_is_refused_before_training(
    text: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        refuse_scorers(recipe(evaluation={"benchmarks": [{"name": "b", "path": str(path)}]}).evaluation, HubResource())


def test_benchmarks_have_names_of_their_own_and_lie_beside_the_recipe() -> None:
    one = {"name": "b", "path": "./b.jsonl"}
    with pytest.raises(ConfigError, match="two benchmarks are called b"):
        parse_recipe(demo_recipe(evaluation={"benchmarks": [one, one]}))
    resolved = resolve_paths(recipe(evaluation={"benchmarks": [one]}), Path("/project"))
    assert resolved.evaluation.benchmarks[0].path == "/project/b.jsonl"


# --- RewardBench's own arithmetic -------------------------------------------------------------------------------------


def answered(rewards: Sequence[float], right: int = 1, name: str = "1", subset: str = "Focus") -> Answered:
    texts = tuple(f"answer {n}" for n in range(len(rewards)))
    question = Question(1, name, subset, [user(name)], texts[:right], texts[right:])
    return Answered(question, name, tuple(rewards))


def tied_rows() -> list[Answered]:
    """Twelve prompts with both halves; one without spread, one where all is equal, one without its other half."""
    drawn = random.Random(7)
    rows = []
    for number in range(12):
        for kind, count in (("ref", 1), ("tied", drawn.choice([2, 3, 5]))):
            base = drawn.gauss(1.0, 1.0)
            right = [round(base + drawn.gauss(0, 0.3), 3) for _ in range(count)]
            wrong = [round(drawn.gauss(-0.5, 0.7), 3) for _ in range(3)]
            rows.append(answered(right + wrong, count, f"{kind}:{number}", "Ties"))
    rows += [answered([1.0, 1.0, 0.5], 2, "tied:12", "Ties"), answered([2.0, 0.0], 1, "ref:12", "Ties")]
    rows += [answered([0.5, 0.5, 0.5], 2, "tied:13", "Ties"), answered([0.5, 0.5], 1, "ref:13", "Ties")]
    return [*rows, answered([0.9, 0.5], 1, "ref:14", "Ties")]


def test_ties_are_scored_as_reward_bench_2_scores_them() -> None:
    """`process_single_model` of allenai/reward-bench at 05a9005 gave 0.5846598388339111 for these rewards."""
    found = ties_score(tied_rows(), 0.95)
    assert found.value == pytest.approx(0.5846598388339111, abs=1e-12)
    assert (found.n, found.clusters) == (15, 15)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert ties_score(tied_rows()[::-1], 0.95) == found
    alone = ties_score([row for row in tied_rows() if row.question.name.startswith("ref")], 0.95)
    assert alone.value != alone.value, "without a `tied` row the formula has no value"


@pytest.mark.parametrize(
    ("format_", "rewards", "counts"),
    [
        ("rewardbench", [1.0, 0.5], 1.0),
        ("rewardbench", [0.5, 0.5], 0.0),  # A tie is wrong there.
        ("rewardbench", [0.4, 0.5], 0.0),
        ("rewardbench2", [1.0, 0.5, 0.2, -1.0], 1.0),
        ("rewardbench2", [1.0, 0.5, 1.2, -1.0], 0.0),
        ("rewardbench2", [1.0, 1.0, 0.0, 1.0], 1 / 3),  # `reroll_and_score_dataset` gave 0.3333333333333333.
    ],
)
def test_a_row_counts_as_the_benchmark_counts_it(format_: Any, rewards: list[float], counts: float) -> None:
    assert credit(format_, answered(rewards)) == counts


def test_sections_are_weighted_as_reward_bench_weights_them() -> None:
    """`calculate_scores_per_section` (same commit) gave these for the shares of eight subsets."""
    shares = {
        "alpacaeval-easy": 9, "mt-bench-med": 5, "llmbar-natural": 7, "math-prm": 4, "hep-cpp": 8,
        "donotanswer": 2.5, "xstest-should-respond": 9.5, "mt-bench-hard": 1,
    }  # fmt: skip
    rows = [
        answered([1.0, 0.0] if n < 2 * share else [0.0, 1.0], 1, f"{subset} {n}", subset)
        for subset, share in shares.items()
        for n in range(20)
    ]
    found = summarise("b", "rewardbench", rows, [], 0.95)
    assert {name: score.value for name, score in found.sections.items()} == pytest.approx(
        {
            "Chat": 0.7857142857142857,
            "Chat Hard": 0.537956204379562,
            "Safety": 0.7033678756476683,
            "Reasoning": 0.4571428571428572,
        }
    )
    assert found.overall.value == pytest.approx(sum(score.value for score in found.sections.values()) / len(SECTIONS))
    assert found.by_row.value == pytest.approx(sum(shares.values()) / 80)
    part = summarise("b", "rewardbench", [row for row in rows if row.question.subset == "hep-cpp"], [], 0.95)
    assert (part.overall, list(part.sections)) == (part.by_row, ["Reasoning"])


def test_reward_bench_2_is_the_mean_of_its_subsets_however_large() -> None:
    rows = [answered([1.0, 0.0, 0.0, 0.0], name=f"a {n}") for n in range(30)]
    rows += [answered([0.0, 1.0, 0.0, 0.0], name=f"b {n}", subset="Math") for n in range(10)]
    found = summarise("b", "rewardbench2", [*rows, *tied_rows()], [], 0.95)
    assert found.overall.value == pytest.approx((1.0 + 0.0 + 0.5846598388339111) / 3)
    assert found.by_row.value == pytest.approx(0.75)
    assert found.rows == 40 + 29
    assert found.undecided == 0


@pytest.mark.parametrize("format_", ["rewardbench", "rewardbench2"])
def test_a_benchmark_of_which_every_row_was_left_out_has_no_score(format_: Any) -> None:
    """It had 0.000 as the mean of no subset."""
    found = summarise("b", format_, [], [LeftOut(1, "too_long", "100 tokens")], 0.95)
    assert math.isnan(found.overall.value)
    assert math.isnan(found.by_row.value)
    assert (found.rows, found.left_out) == (1, {"too_long": 1})


def test_rows_of_one_prompt_are_no_independent_evidence() -> None:
    """Ten rows each of twenty prompts, right or wrong together."""
    rows = [answered([1.0, 0.0] if n < 10 else [0.0, 1.0], name=f"p {n}") for n in range(20) for _ in range(10)]
    found = summarise("b", "rewardbench", rows, [], 0.95).by_row
    assert (found.n, found.clusters) == (200, 20)
    assert found.low is not None
    assert found.low < 0.32, "200 independent rows would reach no lower than 0.43"


def test_the_ends_of_a_weighted_mean_add_up_as_variances_do() -> None:
    one = MeanScore(0.5, 0.4, 0.6, 10, 10)
    both = weighted([one, one], [1.0, 1.0])
    assert (both.value, both.low) == pytest.approx((0.5, 0.5 - 0.1 / 2**0.5))
    assert weighted([one, MeanScore(0.5, None, None, 1, 1)], [1.0, 1.0]).low is None


# --- the worker -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy: stories260K with its last layer moved."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    shutil.copytree(STORIES, folder)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def spec(out: Path, policy: Path, *files: Path, **changes: Any) -> BenchmarkSpec:
    out.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "output_dir": out, "fingerprint": "f" * 32, "inputs": {}, "base_model": STORIES, "plan": plan(**ON_CPU),
        "sft_adapter": None, "policy": policy, "confidence": 0.95,
        "benchmarks": [BenchmarkFile(name=file.stem, path=file, format="auto") for file in files],
    }  # fmt: skip
    return BenchmarkSpec.model_validate(values | changes)


def by_hand(model: Any, prompt: str, answer: str) -> float:
    """Summed log-probability of an answer behind its prompt, by the model's own forward."""
    chat = load_chat_format(STORIES)
    asked = chat.prompt_ids([user(prompt)])
    [text] = chat.texts([[user(prompt), {"role": "assistant", "content": answer}]], answer_follows=False)
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(asked)] == asked
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logps[n - 1, ids[n]] for n in range(len(asked), len(ids))))


def test_the_rewards_are_the_policys_log_ratio_to_sft_for_every_answer(other: Path, tmp_path: Path) -> None:
    ties = [
        second_row(subset="Ties", id="tied:1", chosen=["Red.", "Blue.", "Green."], num_correct=3),
        second_row(subset="Ties", id="ref:1", chosen=["Red."], rejected=["A stone.", "One upon a time."]),
    ]
    long = second_row(id="9", prompt="Tell me of a cat. " * 40)
    first = lines(tmp_path / "first.jsonl", [first_row(), first_row(prompt="Who?", id=8, subset="hard"), {"id": 1}])
    second = lines(tmp_path / "second.jsonl", [ties[1], long, ties[0], second_row()])
    out, log = tmp_path / "out", Log()
    benchmark.run(spec(out, other, first, second), log)

    table = pl.read_parquet(out / "answers.parquet")
    rows = {("first", 1): first_row(), ("second", 1): ties[1], ("second", 3): ties[0], ("second", 4): second_row()}
    base, policy = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (STORIES, other))
    for (name, number), row in rows.items():
        own = table.filter((pl.col("benchmark") == name) & (pl.col("row") == number)).sort("answer")
        sides = [side if isinstance(side, list) else [side] for side in (row["chosen"], row["rejected"])]
        texts = [*sides[0], *sides[1]]
        assert own["right"].to_list() == [True] * len(sides[0]) + [False] * len(sides[1])
        assert own[QUESTION].n_unique() == 1
        for who, model in (("sft", base), ("policy", policy)):
            assert own[who].to_list() == pytest.approx([by_hand(model, row["prompt"], t) for t in texts], abs=1e-4)
    assert table[QUESTION].n_unique() == len({str((row["chosen"], row["rejected"])) for row in rows.values()})
    left_out = [(r["benchmark"], r["number"], r["reason"]) for r in json.loads((out / "left_out.json").read_text())]
    assert left_out == [("first", 3, "no_prompt"), ("second", 2, "too_long")]

    report = BenchmarkScores.model_validate_json((out / "report.json").read_text())
    one, two = report.benchmarks
    assert (one.name, one.format, one.rows, one.left_out) == ("first", "rewardbench", 3, {"no_prompt": 1})
    assert (two.name, two.format, two.rows, two.left_out) == ("second", "rewardbench2", 4, {"too_long": 1})
    assert [part.name for part in two.subsets] == ["Focus", "Ties"]
    gained = table.with_columns(reward=pl.col("policy") - pl.col("sft")).filter(pl.col("benchmark") == "first")
    won = [r["reward"].to_list()[0] > r["reward"].to_list()[1] for _, r in gained.group_by("row", maintain_order=True)]
    assert {part.name: part.score.value for part in one.subsets} == {"easy": float(won[0]), "hard": float(won[1])}
    assert any("2 rows to score, 1 left out" in message for message in log.messages)


def test_an_answer_has_the_same_reward_however_its_row_is_cut_into_forwards(other: Path, tmp_path: Path) -> None:
    many = second_row(rejected=[f"A stone of {n} pounds." for n in range(9)])
    path = lines(tmp_path / "rows.jsonl", [many])
    for name, budget in (("one", 4096), ("many", 40)):
        benchmark.run(spec(tmp_path / name, other, path, plan=plan(**ON_CPU | {"token_budget": budget})), Log())
    one, cut = (pl.read_parquet(tmp_path / name / "answers.parquet")["policy"].to_list() for name in ("one", "many"))
    assert one == pytest.approx(cut, abs=1e-4)
    group = Group([1, 2, 3], ([4] * 5, [5] * 5, [6] * 9, [7]))
    assert [part.completions for part in group.within(13)] == [([4] * 5, [5] * 5), ([6] * 9, [7])]
    assert [len(part.completions) for part in group.within(12)] == [1, 1, 1, 1]
    assert [len(part.completions) for part in group.within(2)] == [1, 1, 1, 1]


def test_a_benchmark_of_which_no_row_fits_is_a_fault_of_the_recipe(other: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [first_row(prompt="A word. " * 60)])
    with pytest.raises(ConfigError, match=r"fits feedback\.max_length 96: 1 too_long"):
        benchmark.run(spec(tmp_path / "out", other, path), Log())


# --- the asset --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as opened:
        yield Shelf(opened)


def test_a_pipeline_scores_its_benchmarks_and_says_which_rows_it_was_trained_on(
    shelf: Shelf, other: Path, tmp_path: Path
) -> None:
    file = lines(tmp_path / "bench.jsonl", [first_row(), first_row(prompt="What is  a dog?", id=8), {"id": 9}])
    recipe_ = demo_recipe(evaluation={"benchmarks": [{"name": "bench", "path": str(file)}]})
    trained = pl.DataFrame({"group_id": [prompt_ids([user("What is a dog?")])[1]]})

    def fill(node: str, folder: Path) -> None:
        if node == "merged_model":
            shutil.copytree(other, folder / "model")
        if node in ("sft_checkpoint", "dpo_adapter"):
            trained.write_parquet(folder / TRAINED_GROUPS)

    base = materialize(recipe_, shelf.instance, ["base_model"])
    assert base.success, failures(base)
    shelf.now["base_model"] = next(shelf.tree.listed("base_model"))
    for node in ORDER[1:-1]:
        settings_ = ON_CPU if node == "dpo_plan" else {}
        shelf.make(node, also=lambda folder, node=node: fill(node, folder), **settings_)
    result = materialize(recipe_, shelf.instance, ["benchmark_scores"])
    assert result.success, failures(result)
    failed = failed_checks(result)
    assert set(failed) == {"benchmark_whole", "benchmark_unseen"}
    assert "bench: 1 of 3 rows (1 no_prompt)" in failed["benchmark_whole"]["note"]
    assert failed["benchmark_unseen"]["note"] == "bench: 1"
    told = metadata(result, "benchmark_scores")
    assert (told["bench overall"] in (0.0, 0.5, 1.0), told["scored"]) == (True, "merged model in fp32")
    assert "no_prompt" in told["left_out"]
    file.rename(tmp_path / "moved.jsonl")
    moved = demo_recipe(evaluation={"benchmarks": [{"name": "bench", "path": str(tmp_path / "moved.jsonl")}]})
    assert metadata(materialize(moved, shelf.instance, ["benchmark_scores"]), "benchmark_scores")["reused"] != "no"


def test_whole_benchmarks_of_unseen_questions_pass() -> None:
    assert [verdict.passed for verdict in benchmark_verdicts(benchmark_scores(), {"b": 0})] == [True, True]


def test_a_score_that_is_no_number_is_warned_of() -> None:
    questions = [Question(n, str(n), "all", [{"role": "user", "content": f"q{n}"}], ("a",), ("b",)) for n in range(9)]
    for fault in (math.nan, math.inf):
        rows = [Answered(one, f"p{n}", (fault if n == 7 else 1.0, 0.0)) for n, one in enumerate(questions)]
        score = summarise("bench", "rewardbench", rows, [], 0.95)
        report = BenchmarkScores(confidence=0.95, scored="merged", kernels="rows", benchmarks=(score,))
        verdict, _ = benchmark_verdicts(report, {"bench": 0})
        assert not verdict.passed
        assert "no number: bench: all" in str(verdict.value)
        assert "no number stand in the answers" in verdict.fix
