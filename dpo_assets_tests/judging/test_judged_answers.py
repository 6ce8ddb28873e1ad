"""The asset `judged_answers`: in a pipeline that declares a judge, from the artefacts of evaluation and dataset.

The artefacts are made by hand; the step, Dagster and the protocol are real. One judge is a real tiny language model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_assets import build_dpo_defs
from dpo_assets.artifact import write_json
from dpo_assets.checks.reports import JudgedAnswers
from dpo_assets_tests.judging.server import KEY, JudgeServer, by_merit
from dpo_assets_tests.pipelines import STORIES, demo_recipe, failed_checks, failures, materialize, metadata
from dpo_assets_tests.samples import dataset_report, evaluation_report
from dpo_assets_tests.test_lineage import ORDER, Shelf

PROMPTS, PAIRS = 6, 60


def fill(shelf: Shelf, better: int = PROMPTS, of_plan: dict[str, Any] = {}) -> None:
    """Evaluated answers, `better` of the policy's longer ones, and held-out pairs whose chosen answer is the longer."""

    def asked(number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Question {number}?"}]

    def write(node: str, folder: Path) -> None:
        if node == "eval_scores":
            write_json(folder / "report.json", evaluation_report().model_dump(mode="json"))
            rows = [
                {"prompt": asked(n), "sft": "a short one", "policy": "a longer one, by far" if n < better else "no"}
                for n in range(PROMPTS)
            ]
            write_json(folder / "generations.json", rows)
        if node == "dpo_dataset":
            write_json(folder / "report.json", dataset_report())
            answer = [{"role": "assistant", "content": "a longer answer of a person"}]
            other = [{"role": "assistant", "content": "short"}]
            pairs = [
                {"pair_id": f"{n:03}", "prompt_id": f"{n % PAIRS}", "prompt": asked(n % PAIRS), "chosen": answer}
                | {"rejected": other, "label_kind": "human_pair"}
                for n in range(2 * PAIRS)  # Two of each prompt, of which one is asked about.
            ]
            pl.DataFrame(pairs).write_parquet(folder / "eval.parquet")

    for node in ORDER[:-1]:
        settings = of_plan if node == "dpo_plan" else {}
        shelf.make(node, str(better), also=lambda folder, node=node: write(node, folder), **settings)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as opened:
        yield Shelf(opened)


def declaring(server: JudgeServer, **judge: Any) -> dict[str, Any]:
    return demo_recipe(
        evaluation={"judge": {"url": server.url, "model": "small", "key_variable": "JUDGE_KEY", **judge}}
    )


def judged(shelf: Shelf, recipe: dict[str, Any]) -> dg.ExecuteInProcessResult:
    return materialize(recipe, shelf.instance, ["judged_answers"])


def report(result: dg.ExecuteInProcessResult) -> JudgedAnswers:
    folder = Path(metadata(result, "judged_answers")["path"])
    return JudgedAnswers.model_validate_json((folder / "report.json").read_text())


def test_a_pipeline_has_the_asset_where_its_recipe_declares_a_judge() -> None:
    key = dg.AssetKey(["demo", "judged_answers"])
    with JudgeServer(by_merit(len)) as server:
        declared = build_dpo_defs("demo", declaring(server)).resolve_asset_graph()
    assert key in declared.get_all_asset_keys()
    assert {parent.path[-1] for parent in declared.get(key).parent_keys} == {"eval_scores", "dpo_dataset"}
    assert key not in build_dpo_defs("demo", demo_recipe()).resolve_asset_graph().get_all_asset_keys()


def test_answers_are_compared_and_the_judge_is_held_against_people(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    fill(shelf)
    with JudgeServer(by_merit(len), KEY) as server:
        recipe = declaring(server)
        result = judged(shelf, recipe)
        assert result.success, failures(result)
        questions = len(server.requests)
        again = judged(shelf, recipe)  # The artefact.
        fill(shelf, better=PROMPTS - 1)
        other = judged(shelf, recipe)  # All but one question are remembered.
    found = report(result)
    assert (found.wins, found.losses, found.human_pairs, found.agreement.value) == (PROMPTS, 0, PAIRS, 1.0)
    assert found.corrected.value == 1.0
    assert questions == 2 * (PROMPTS + PAIRS)
    assert failed_checks(result) == {}
    assert metadata(again, "judged_answers")["digest"] == metadata(result, "judged_answers")["digest"]
    assert (report(other).wins, report(other).losses) == (PROMPTS - 1, 1)
    assert len(server.requests) == questions + 2
    everything = b"".join(path.read_bytes() for path in shelf.tree.root.rglob("*") if path.is_file())
    assert KEY.encode() not in everything


def test_a_policy_that_the_judge_likes_less_and_a_judge_against_people_are_warned_of(shelf: Shelf) -> None:
    fill(shelf, better=0)
    with JudgeServer(by_merit(len)) as server:
        assert set(failed_checks(judged(shelf, declaring(server)))) == {"judged_better"}
    with JudgeServer(by_merit(lambda answer: -len(answer))) as server:
        against = judged(shelf, declaring(server, model="contrary"))
    assert against.success
    assert "may be chance" in failed_checks(against)["judge_health"]["what to change"]


@pytest.mark.parametrize("form", ["text", "letter"])
def test_a_judge_that_refuses_the_key_fails_at_once_with_its_variable(shelf: Shelf, form: str) -> None:
    fill(shelf)
    with JudgeServer(by_merit(len), KEY) as server:
        [said] = failures(judged(shelf, declaring(server, verdict=form)))
    assert "refuses the key in JUDGE_KEY" in said
    assert len(server.requests) == 1


def test_a_real_tiny_model_that_gives_no_verdicts_is_said_to_be_no_judge(shelf: Shelf) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(STORIES), AutoModelForCausalLM.from_pretrained(STORIES)

    def answer(messages: list[dict[str, str]]) -> str:
        ids = tokenizer(messages[-1]["content"][-200:], return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return str(tokenizer.decode(out[0, ids.shape[1] :]))

    fill(shelf)
    with JudgeServer(answer) as server:
        result = judged(shelf, declaring(server, human_pairs=4))
    assert result.success, failures(result)
    assert report(result).nulls == PROMPTS
    assert report(result).share.n == 0
    assert set(failed_checks(result)) == {"judge_health", "judged_better"}
    assert "hold no verdict" in failed_checks(result)["judge_health"]["what to change"]
    kept = json.loads((Path(metadata(result, "judged_answers")["path"]) / "compared.json").read_text())
    assert all(one["replies"][0] for one in kept)
