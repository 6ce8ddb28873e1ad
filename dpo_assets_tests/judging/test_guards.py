"""Tasks and benchmarks that guard a promotion: compared with the champion item by item, and what holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from dpo_assets import build_dpo_defs
from dpo_assets.artifact import Artifact, ArtifactTree, write_json
from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.checks.evidence.rules import Evidence, judge
from dpo_assets.checks.evidence.task_guards import TaskGuard, fallen
from dpo_assets.checks.reports import BenchmarkScores, HarnessScores, TaskScore
from dpo_assets.contract import ANSWERED, QUESTION, SAMPLES
from dpo_assets.judging.documents import paired_scores
from dpo_assets.judging.guards import benchmark_guards, harness_guards
from dpo_assets_tests.checks.test_evidence_release import BETTER
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import demo_recipe, failures, metadata
from dpo_assets_tests.test_lineage import Shelf
from dpo_assets_tests.test_promotion import first_release, hub, refresh, shelf
from dpo_assets_tests.test_published_model import release, sending

__all__ = ["hub", "shelf"]  # Fixtures.
DOCUMENTS = 100
Filling = Callable[[Path], None]


def task(
    right: int, *, first: int = 0, higher: bool = True, sft: int = 80, version: str = "0", scored: str = "merged"
) -> Filling:
    """`harness_scores` of one metric, right on the first so many of `DOCUMENTS` documents; SFT on the first `sft`."""

    def fill(folder: Path) -> None:
        rows: list[dict[str, Any]] = [
            {
                "task": "choice", "metric": "acc", "filter": "none", "document": first + n, "doc_hash": f"d{first + n}",
                "prompt_hash": "p", "target_hash": "t", "sft": float(n < sft), "policy": float(n < right),
            }
            for n in range(DOCUMENTS)
        ]  # fmt: skip
        write_json(folder / SAMPLES, rows)
        sides = [[row[side] for row in rows] for side in ("sft", "policy")]
        means = (sft / DOCUMENTS, right / DOCUMENTS)
        found = paired_scores(*sides, [row["doc_hash"] for row in rows], means, 0.95)
        score = TaskScore(
            task="choice", metric="acc", filter="none", higher_is_better=higher, documents=DOCUMENTS, sft=means[0],
            policy=means[1], comparison=found.comparison, difference=found.difference,
        )  # fmt: skip
        HarnessScores(version=version, confidence=0.95, scored=scored, tasks=(score,)).write(folder)

    return fill


def bench(
    right: int,
    *,
    answers: int = 2,
    alike: bool = False,
    name: str = "rb",
    texts: str = "as first written",
    scored: str = "merged",
) -> Filling:
    """`benchmark_scores` of one benchmark: the right answer's reward is the highest in so many rows, else it is lower,
    or `alike`, the same. A row of two right answers stands beside them."""

    def fill(folder: Path) -> None:
        rows = [
            {
                "benchmark": name, "row": n, "id": f"{n}", "prompt_id": f"{n}", "group_id": f"{n}", "answer": answer,
                QUESTION: f"{texts} {n}", "right": answer == 0, "sft": -1.0,
                "policy": 0.0 if answer else 1.0 if n < right else 0.0 if alike else -1.0,
            }
            for n in range(DOCUMENTS)
            for answer in range(answers)
        ]  # fmt: skip
        rows += [{**rows[0], "row": DOCUMENTS, "answer": answer, "right": answer < 2} for answer in range(3)]
        pl.DataFrame(rows).write_parquet(folder / ANSWERED)
        BenchmarkScores(confidence=0.95, scored=scored, kernels="fused", benchmarks=()).write(folder)

    return fill


def made(tree: ArtifactTree, fill: Filling, number: int) -> Artifact:
    return tree.find_or_build("scores", f"{number:032x}", fill, {})[0]


@pytest.fixture
def tree(tmp_path: Path) -> ArtifactTree:
    return ArtifactTree(tmp_path / "store")


@pytest.mark.parametrize(
    ("p_values", "names"),
    [
        ([0.001, 0.5], ["0"]),
        ([0.02], ["0"]),
        ([0.02, 0.9, 0.9], []),  # Three chances.
        ([math.nan, 0.9], ["0"]),
        ([None, None], []),
        ([], []),
    ],
    ids=["fell", "alone", "one of three", "no number", "not compared", "none"],
)
def test_what_fell_beyond_chance_over_all_metrics_holds(p_values: Sequence[float | None], names: list[str]) -> None:
    assert fallen({f"{n}": TaskGuard("x", p) for n, p in enumerate(p_values)}) == names


def test_a_task_that_fell_holds_a_challenger_that_is_better_and_one_that_did_not_is_shown() -> None:
    held = judge(Evidence({"a": BETTER}, tasks={"choice acc": TaskGuard("-0.200 [-0.3, -0.1]", 1e-4)}), Ledger())
    assert (held.decision, held.found) == ("hold", False)
    assert held.reason == "worse than its start on tasks: choice acc -0.200 [-0.3, -0.1]"
    tasks = {"choice acc": TaskGuard("+0.0", 0.4), "other": TaskGuard("not compared: none", None)}
    passed = judge(Evidence({"a": BETTER}, tasks=tasks), Ledger())
    assert passed.decision == "first_publication"
    assert "1 of 2 guarding metrics compared, none fell" in passed.reason


@pytest.mark.parametrize(
    ("champion", "challenger", "worse"),
    [
        (task(90), task(70), True),
        (task(70), task(90), False),
        (task(90), task(89), False),
        (task(70, higher=False), task(90, higher=False), True),
    ],
    ids=["worse", "better", "chance", "lower is better"],
)
def test_a_metric_is_compared_with_the_champions_document_by_document(
    tree: ArtifactTree, champion: Filling, challenger: Filling, worse: bool
) -> None:
    """SFT beside both was right on 80: what the policy is against its start decides nothing here."""
    [guard] = harness_guards(made(tree, challenger, 1), made(tree, champion, 2), first=False).values()
    assert guard.p_worse is not None
    assert (guard.p_worse < 0.025) is worse
    assert bool(fallen({"choice acc": guard})) is worse


def test_other_documents_or_no_scores_of_the_champion_are_told_and_hold_nothing(tree: ArtifactTree) -> None:
    challenger = made(tree, task(10), 1)
    for champion, why in ((made(tree, task(90, first=7), 2), "was asked others"), (None, "no scores of the champion")):
        found = harness_guards(challenger, champion, first=False)
        assert why in found["choice acc"].shown
        assert fallen(found) == []


def test_before_the_first_release_tasks_are_held_against_sft(tree: ArtifactTree) -> None:
    assert fallen(harness_guards(made(tree, task(60), 1), None, first=True)) == ["choice acc"]
    assert fallen(harness_guards(made(tree, task(80), 2), None, first=True)) == []


@pytest.mark.parametrize(
    ("champion", "challenger", "worse"),
    [
        (bench(90), bench(70), True),
        (bench(90), bench(89), False),
        (bench(90), bench(70, alike=True), True),  # RewardBench: a tie of two is wrong.
        (bench(90, answers=4), bench(40, answers=4, alike=True), True),
    ],
    ids=["worse", "chance", "ties of two", "four answers"],
)
def test_a_benchmark_is_compared_with_the_champions_row_by_row(
    tree: ArtifactTree, champion: Filling, challenger: Filling, worse: bool
) -> None:
    found = benchmark_guards(made(tree, challenger, 1), made(tree, champion, 2), ["rb"], 0.95)
    assert fallen(found) == (["rb"] if worse else [])
    assert "n=100" in found["rb"].shown, "a row of several right answers has no share"


def test_a_benchmark_that_the_champion_was_not_asked_is_told(tree: ArtifactTree) -> None:
    challenger, other = made(tree, bench(10), 1), made(tree, bench(90, name="other"), 2)
    for champion, why in ((other, "was asked others"), (None, "no scores of the champion")):
        found = benchmark_guards(challenger, champion, ["rb"], 0.95)
        assert why in found["rb"].shown
        assert fallen(found) == []


def test_a_benchmark_whose_answers_were_edited_is_another_one(tree: ArtifactTree) -> None:
    """Numbers and prompts of its rows are the same, so all that the champion had right was held against it."""
    challenger, champion = made(tree, bench(10, texts="edited"), 1), made(tree, bench(90), 2)
    found = benchmark_guards(challenger, champion, ["rb"], 0.95)
    assert "not compared: the champion was asked others" in found["rb"].shown
    assert fallen(found) == []
    pl.read_parquet(champion.path / ANSWERED).drop(QUESTION).write_parquet(champion.path / ANSWERED)
    assert "scores of an earlier version" in benchmark_guards(challenger, champion, ["rb"], 0.95)["rb"].shown


def test_what_was_scored_otherwise_is_not_compared(tree: ArtifactTree) -> None:
    """Other weights, or another version of lm-eval, score otherwise by themselves."""
    whole = "merged model in bf16"
    found = benchmark_guards(made(tree, bench(10), 1), made(tree, bench(90, scored=whole), 2), ["rb"], 0.95)
    assert f"not compared: the champion was scored otherwise: {whole}, and the challenger merged" in found["rb"].shown
    assert fallen(found) == []
    before = task(90, version="0.4", scored=whole)
    tasks = harness_guards(made(tree, task(10), 3), made(tree, before, 4), first=False)
    assert "lm-eval 0.4, and the challenger lm-eval 0" in tasks["choice acc"].shown
    assert whole in tasks["choice acc"].shown
    assert fallen(tasks) == []


def guarded_by_tasks(server: HubServer) -> dict[str, Any]:
    return {**sending(server), "evaluation": {"harness": {"tasks": ["choice"], "guards": True}}}


def test_promotion_reads_the_scores_that_guard_it_and_no_others() -> None:
    def reads(**evaluation: Any) -> set[str]:
        defs = build_dpo_defs("demo", demo_recipe(evaluation=evaluation))
        return {key.path[-1] for key in defs.resolve_asset_graph().get(dg.AssetKey(["demo", "promotion"])).parent_keys}

    benchmark = {"name": "rb", "path": "rb.jsonl"}
    assert reads(harness={"tasks": ["choice"]}, benchmarks=[benchmark]) == {"eval_scores"}
    assert reads(harness={"tasks": ["choice"], "guards": True}) == {"eval_scores", "harness_scores"}
    assert reads(benchmarks=[{**benchmark, "guards": True}]) == {"eval_scores", "benchmark_scores"}


@pytest.mark.parametrize(("right", "verdict"), [(60, "hold"), (89, "promote")])
def test_a_better_challenger_that_lost_a_task_is_held_where_the_recipe_says_so(
    shelf: Shelf, hub: HubServer, right: int, verdict: str
) -> None:
    first_release(shelf, hub)
    shelf.make("harness_scores", "champion", also=task(90))
    refresh(shelf, "refreshed", right=0.9)
    shelf.make("harness_scores", "challenger", also=task(right))
    result = release(shelf, guarded_by_tasks(hub))
    assert result.success, failures(result)
    told = metadata(result, "promotion")
    assert told["verdict"] == verdict
    assert ("worse than the champion on tasks: choice acc" in told["verdict_reason"]) is (verdict == "hold")
    assert ("1 of 1 guarding metrics compared" in told["verdict_reason"]) is (verdict == "promote")
    if verdict == "hold":
        without = release(shelf, {**sending(hub), "evaluation": {"harness": {"tasks": ["choice"]}}})
        assert metadata(without, "promotion")["verdict"] == "hold", "what was decided on these scores stays"


def test_the_champions_scores_of_the_challengers_items_are_taken_and_are_on_record(
    shelf: Shelf, hub: HubServer
) -> None:
    """Not the newest, which are of other documents: with these nothing could be compared, and nothing would hold."""
    first_release(shelf, hub)
    theirs = shelf.make("harness_scores", "champion", also=task(90))
    shelf.make("harness_scores", "champion, asked others", also=task(90, first=7))
    refresh(shelf, "refreshed", right=0.9)
    own = shelf.make("harness_scores", "challenger", also=task(60))
    result = release(shelf, guarded_by_tasks(hub))
    assert result.success, failures(result)
    decided = LedgerFile.of(shelf.tree.root).read().decisions[-1]
    assert decided.decision == "hold"
    kept = {name: digest for name, digest in decided.inputs.items() if name.endswith("harness_scores")}
    assert kept == {"harness_scores": own.digest, "champion_harness_scores": theirs.digest}
