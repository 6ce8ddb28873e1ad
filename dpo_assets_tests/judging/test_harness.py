"""The asset `harness_scores`: lm-evaluation-harness, really run where it is installed (extra `lm-eval`)."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_assets.assets import harness_tasks as module
from dpo_assets.assets import scorers_ahead
from dpo_assets.assets.scorers_ahead import refuse_scorers
from dpo_assets.checks.evidence.clusters import clustered_mean
from dpo_assets.checks.evidence.measured import MeanScore
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.harness import harness_verdicts
from dpo_assets.checks.neutral import perplexities
from dpo_assets.checks.reports import HarnessScores
from dpo_assets.contract import LOOKED_UP, HarnessSpec, TasksSpec
from dpo_assets.errors import ConfigError
from dpo_assets.judging.documents import paired_scores, scored
from dpo_assets.recipe import resolve_paths
from dpo_assets.resources.hub import HubResource
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.policy import load_scored
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import settle_engine
from dpo_assets.training.stages import harness
from dpo_assets.training.stages import tasks as tasks_stage
from dpo_assets_tests.pipelines import STORIES, demo_recipe, failures, materialize, metadata
from dpo_assets_tests.samples import harness_scores, plan, recipe
from dpo_assets_tests.test_lineage import ORDER, Shelf

INSTALLED = importlib.util.find_spec("lm_eval") is not None
really = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed here: pip install 'dpo-assets[lm-eval]'")
ON_CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32", "max_length": 96}
DOCUMENTS = 24
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
metadata: {version: 1.0}
"""
TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{[chosen, rejected]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{chosen}}"
metric_list: [{metric: byte_perplexity}]
""",
    "written": """
task: written
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{chosen}}"
generation_kwargs: {max_gen_toks: 4, until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


class Log:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on rows beside them, whose path is relative."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"prompt": f"Once upon a time there was {n}", "chosen": f" a cat {n}.", "rejected": f" a dog {n}."}
        for n in range(DOCUMENTS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.lstrip() + COMMON.lstrip())
    (folder / "both.yaml").write_text("group: both\ntask: [choice, written]\naggregate_metric_list: [{metric: acc}]\n")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy: stories260K with its last layer moved."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    shutil.copytree(STORIES, folder)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def spec(out: Path, policy: Path, tasks: Path | None, *names: str, **changes: Any) -> HarnessSpec:
    out.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "output_dir": out, "fingerprint": "f" * 32, "inputs": {}, "base_model": STORIES, "plan": plan(**ON_CPU),
        "sft_adapter": None, "policy": policy, "confidence": 0.95, "tasks": names, "include_path": tasks,
        "limit": None, "num_fewshot": None, "apply_chat_template": False, "batch_size": 8,
    }  # fmt: skip
    return HarnessSpec.model_validate(values | changes)


def report(out: Path) -> HarnessScores:
    return HarnessScores.model_validate_json((out / "report.json").read_text())


# --- where lm-eval is installed ---------------------------------------------------------------------------------------


@really
def test_both_models_answer_the_tasks_and_are_compared_by_document(tasks: Path, other: Path, tmp_path: Path) -> None:
    log = Log()
    harness.run(spec(tmp_path / "out", other, tasks, "both", "rolling"), log)
    found = {one.task: one for one in report(tmp_path / "out").tasks}
    counts = dict.fromkeys(TASKS, DOCUMENTS)
    assert {name: one.documents for name, one in found.items()} == {**counts, "both": 2 * DOCUMENTS}
    assert found["both"].policy == found["choice"].policy, "a group is told too"
    choice = found["choice"]
    rows = [row for row in json.loads((tmp_path / "out" / "samples.json").read_text()) if row["task"] == "choice"]
    sides = [[row[who] for row in rows] for who in ("policy", "sft")]
    assert choice.comparison == compare(*sides, [row["doc_hash"] for row in rows])
    assert choice.comparison is not None
    assert choice.comparison.clusters == DOCUMENTS
    assert choice.comparison.difference != 0.0, "else the two could be exchanged"
    assert choice.policy - choice.sft == pytest.approx(choice.comparison.difference)
    rolling = found["rolling"]
    assert (rolling.comparison, rolling.difference) == (None, None)
    assert rolling.policy > rolling.sft > 1.0, "the moved model is the worse one"
    assert rolling.perplexity is not None
    assert rolling.perplexity.ratio == pytest.approx(rolling.policy / rolling.sft)
    assert rolling.p_worse is not None
    assert rolling.p_worse < 0.001
    assert len({one.asked for one in found.values() if one.task != "both"}) == 3
    assert found["both"].asked == ""
    assert found["written"].comparison is not None
    assert sum("[progress] harness" in message for message in log.messages) == 2


@really
def test_a_model_against_itself_differs_in_nothing(tasks: Path, tmp_path: Path) -> None:
    harness.run(spec(tmp_path / "out", STORIES, tasks, "choice", limit=10, apply_chat_template=True), Log())
    [one] = report(tmp_path / "out").tasks
    assert one.comparison is not None
    assert (one.documents, one.comparison.difference, one.comparison.discordant) == (10, 0.0, 0)


@really
def test_log_likelihoods_are_those_of_the_packed_engine(tasks: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    chat, settled = load_chat_format(STORIES), plan(**ON_CPU)
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()][:8]
    asked = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    model = load_scored(STORIES, settled, None)
    lm = HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=4)
    theirs = lm.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(asked)])
    groups = []
    for prompt, answer in asked:
        whole, context = (chat.tokenizer(text)["input_ids"] for text in (prompt + answer, prompt))
        assert whole[: len(context)] == context
        groups.append(Group(context, (whole[len(context) :],)))
    settle_engine(model, settled, max(groups, key=lambda group: group.longest_row))
    ours, _ = score_groups(model, groups, 256)
    assert [value for value, _ in theirs] == pytest.approx(ours, abs=1e-4)


@really
@pytest.mark.parametrize(
    ("names", "said"),
    [(("nowhere",), "there is no task nowhere"), (("broken",), "lm-eval cannot run broken.*no network")],
    ids=["unknown", "no data"],
)
def test_what_lm_eval_cannot_run_says_which_and_what_to_do(
    names: Sequence[str], said: str, tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    broken = TASKS["choice"].replace("choice\n", "broken\n", 1) + COMMON.replace("rows.jsonl", "gone.jsonl")
    (folder / "broken.yaml").write_text(broken)
    with pytest.raises(ConfigError, match=said):
        harness.run(spec(tmp_path / "out", STORIES, folder, *names), Log())


@really
def test_a_pipeline_runs_its_tasks_in_the_worker(tasks: Path, other: Path, tmp_path: Path) -> None:
    declared = demo_recipe(evaluation={"harness": {"tasks": ["choice"], "include_path": str(tasks), "limit": 8}})

    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as instance:
        shelf = Shelf(instance)
        base = materialize(declared, instance, ["base_model"])
        assert base.success, failures(base)
        shelf.now["base_model"] = next(shelf.tree.listed("base_model"))
        for node in ORDER[1:-1]:
            copied = node == "merged_model"
            shelf.make(
                node,
                also=lambda folder, copied=copied: copied and shutil.copytree(other, folder / "model"),
                **(ON_CPU if node == "dpo_plan" else {}),
            )
        result = materialize(declared, instance, ["harness_scores"])
        assert result.success, failures(result)
        told = metadata(result, "harness_scores")
        assert 0.0 <= told["choice acc"] <= 1.0
        assert metadata(materialize(declared, instance, ["harness_scores"]), "harness_scores")["reused"] != "no"


@really
@pytest.mark.parametrize(
    ("broken", "said"),
    [("", ""), ("name", "there is no task chioce"), ("data", "lm-eval cannot run choice.*no network")],
    ids=["whole", "a typing error", "no dataset"],
)
def test_tasks_are_looked_up_with_their_documents_before_training(
    broken: str, said: str, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in a task's name was found after the training."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    if broken == "data":
        (folder / "rows.jsonl").unlink()
    out = tmp_path / "out"
    out.mkdir()
    asked = TasksSpec(
        output_dir=out, fingerprint="f" * 32, inputs={}, base_model=STORIES, include_path=folder,
        tasks=("chioce" if broken == "name" else "choice", "rolling"),
    )  # fmt: skip
    if said:
        with pytest.raises(ConfigError, match=said):
            tasks_stage.run(asked, Log())
    else:
        tasks_stage.run(asked, Log())
        assert json.loads((out / LOOKED_UP).read_text())["tasks"] == ["choice", "rolling"]


# --- everywhere -------------------------------------------------------------------------------------------------------


def declared(**more: Any) -> Any:
    return recipe(evaluation={"harness": {"tasks": ["choice"], **more}}).evaluation


def test_a_missing_package_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed here is what differs from place to place, so the answer is given."""
    monkeypatch.setattr(scorers_ahead.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dpo-assets\[lm-eval\]'"):
        refuse_scorers(declared(), HubResource())


def test_a_folder_of_tasks_that_is_not_there_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers_ahead.importlib.util, "find_spec", lambda name: name)  # Here it may not be installed.
    with pytest.raises(ConfigError, match="there is no folder"):
        refuse_scorers(declared(include_path=str(tmp_path / "gone")), HubResource())
    refuse_scorers(declared(include_path=str(tmp_path)), HubResource())
    refuse_scorers(declared(), HubResource())


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed here, so no worker can lack it")
def test_a_worker_without_the_package_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"in the worker's environment.*dpo-assets\[lm-eval\]"):
        harness.run(spec(tmp_path / "out", STORIES, None, "choice"), Log())


def test_tasks_lie_beside_the_recipe() -> None:
    declared_ = recipe(evaluation={"harness": {"tasks": ["choice"], "include_path": "./tasks"}})
    resolved = resolve_paths(declared_, Path("/project")).evaluation.harness
    assert resolved is not None
    assert resolved.include_path == "/project/tasks"


def alike(fell: int, of: int = 100) -> Any:
    return compare([0.0] * fell + [1.0] * (of - fell), [1.0] * of)


def worse_by(factor: float) -> Any:
    """Perplexities per byte of 30 texts of 50 to 79 bytes; a policy whose are `factor` times those of SFT."""
    sizes = [float(50 + n) for n in range(30)]
    before = [-size * (1.6 + 0.01 * (n % 5)) for n, size in enumerate(sizes)]
    lost = [size * (math.log(factor) + 0.02 * (n % 3 - 1)) for n, size in enumerate(sizes)]
    return perplexities(sizes, before, [nats - gone for nats, gone in zip(before, lost, strict=True)])


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"comparison": alike(12)}, False),
        ({"comparison": alike(2)}, True),
        ({"comparison": alike(12), "higher_is_better": False}, True),
        ({"comparison": alike(12), "higher_is_better": None}, True),  # Its task does not say which way is worse.
        ({"comparison": None, "difference": MeanScore(-0.2, -0.3, -0.1, 9, 9, 1e-3)}, False),
        ({"comparison": None, "difference": MeanScore(-0.2, -0.5, 0.1, 9, 9, 0.1)}, True),
        ({"comparison": None, "difference": MeanScore(-0.2, -0.3, -0.1, 9, 9, 1e-3), "higher_is_better": False}, True),
        ({"comparison": None, "difference": MeanScore(0.2, 0.1, 0.3, 9, 9, 0.999), "higher_is_better": False}, False),
        ({"comparison": None, "difference": MeanScore(-0.2, -0.3, -0.1, 9, 9, 1e-3), "higher_is_better": None}, True),
        ({"comparison": None, "difference": None}, True),
        ({"comparison": None, "difference": None, "policy": math.nan}, False),
        ({"comparison": compare([math.nan, 1.0], [1.0, 1.0])}, False),
        ({"comparison": None, "difference": MeanScore(math.nan, None, None, 9, 9)}, False),
        ({"comparison": None, "difference": None, "perplexity": worse_by(1000.0)}, False),
        ({"comparison": None, "difference": None, "perplexity": worse_by(0.9)}, True),
    ],
)
def test_a_metric_that_fell_beyond_chance_is_warned_of(changes: dict[str, Any], passed: bool) -> None:
    [verdict] = harness_verdicts(harness_scores(**changes))
    assert verdict.passed is passed
    assert passed or "facts acc" in str(verdict.value)


def test_many_metrics_are_many_chances() -> None:
    """One of twenty that fell with p = 0.016 may be chance; alone it is not."""
    fallen, still = harness_scores(comparison=alike(6)), harness_scores()
    assert not harness_verdicts(fallen)[0].passed
    named = [one.model_copy(update={"task": f"task {n}"}) for n in range(19) for one in still.tasks]
    assert harness_verdicts(fallen.model_copy(update={"tasks": (*fallen.tasks, *named)}))[0].passed


def test_a_metric_without_a_paired_difference_is_named() -> None:
    [verdict] = harness_verdicts(harness_scores(comparison=None, difference=None))
    assert "not tested, for documents or task do not tell what is worse: facts acc" in verdict.note
    assert not harness_verdicts(harness_scores().model_copy(update={"tasks": ()}))[0].passed
    assert math.isfinite(harness_scores().tasks[0].sft)


def test_twenty_harmless_metrics_that_are_means_are_many_chances_too() -> None:
    """Each alone falls in 2.5 of 100 runs; all of them together may, too."""
    drawn, [one] = random.Random(1), harness_scores().tasks
    warned = 0
    for _ in range(200):
        means = [clustered_mean([drawn.gauss(0, 1) for _ in range(60)]) for _ in range(20)]
        several = tuple(
            one.model_copy(update={"task": f"t{n}", "comparison": None, "difference": mean})
            for n, mean in enumerate(means)
        )
        warned += not harness_verdicts(harness_scores().model_copy(update={"tasks": several}))[0].passed
    assert warned / 200 <= 0.06


# --- what documents gave ----------------------------------------------------------------------------------------------


def side(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `simple_evaluate` returns of one task, as far as documents go."""
    alike = {"filter": "none", "doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "metrics": ["acc"], "acc": 1.0}
    return {"samples": {"task": [alike | {"doc_id": n} | one for n, one in enumerate(documents)]}}


@pytest.mark.parametrize("changed", ["doc_hash", "prompt_hash", "target_hash"])
def test_documents_of_one_number_and_other_content_are_not_paired(changed: str) -> None:
    asked, other = side([{}, {}]), side([{}, {changed: "x"}])
    assert len(list(harness._paired("task", asked, asked))) == 2
    with pytest.raises(ConfigError, match=r"different documents of task \(document 1 and 0 more\)"):
        list(harness._paired("task", asked, other))


@pytest.mark.parametrize("other", [[{}], [{}, {}, {}], [{}, {}, {"doc_id": 0}]], ids=["fewer", "more", "one twice"])
def test_documents_that_one_side_lacks_or_has_twice_are_not_paired(other: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="different documents of task"):
        list(harness._paired("task", side([{}, {}]), side(other)))


LOGS = [-10.0 - n for n in range(12)]
WORSE = [nats * 1.5 - n % 2 for n, nats in enumerate(LOGS)]
SIZES = [20.0 + n for n in range(12)]


def total(logs: Sequence[float], sizes: Sequence[float]) -> float:
    return -math.fsum(logs) / math.fsum(sizes)


@pytest.mark.parametrize("aggregated", [math.exp, lambda nats: nats / math.log(2)], ids=["perplexity", "bits"])
def test_log_likelihoods_are_paired_where_they_make_up_the_metric(aggregated: Callable[[float], float]) -> None:
    before, after = ([(nats, size) for nats, size in zip(logs, SIZES, strict=True)] for logs in (LOGS, WORSE))
    told = (aggregated(total(LOGS, SIZES)), aggregated(total(WORSE, SIZES)))
    found = paired_scores(before, after, range(12), told, 0.95).perplexity
    assert found == perplexities(SIZES, LOGS, WORSE, range(12))
    assert found.p_above is not None
    assert found.p_above < 1e-3
    assert paired_scores(before, after, range(12), (told[0], told[1] * 1.01), 0.95).perplexity is None
    assert paired_scores(before, [*after[:-1], (WORSE[-1], 9.0)], range(12), told, 0.95).perplexity is None


def test_a_perplexity_of_log_likelihoods_without_sizes_is_worse_where_they_are_lower() -> None:
    """Their difference has the other sign than that of the perplexity: taken for its own, a fall would be a gain."""
    told = (math.exp(total(LOGS, [1.0] * 12)), math.exp(total(WORSE, [1.0] * 12)))
    found = paired_scores(LOGS, WORSE, range(12), told, 0.95)
    assert (found.comparison, found.difference) == (None, None)
    assert found.perplexity is not None
    assert found.perplexity.ratio == pytest.approx(told[1] / told[0])


def test_values_that_do_not_make_up_the_metric_are_not_compared_in_its_name() -> None:
    labels: list[Any] = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]
    for values, told in ((labels, 0.5), ([1.0, 0.0, 1.0], 0.9), ([1.0, None, 1.0], 1.0)):
        found = paired_scores(values, values, range(3), (told, told), 0.95)
        assert (found.comparison, found.difference, found.perplexity) == (None, None, None)
    assert paired_scores([1.0, 0.0], [1.0, 0.0], range(2), (0.5, 0.5), 0.95).comparison is not None
    assert [scored(one) for one in ("5", None, True, 2, (1, 2), [1, "x"], (1, 2, 3), {})] == [
        None, None, 1.0, 2.0, (1.0, 2.0), None, None, None,
    ]  # fmt: skip


def test_a_metric_that_is_no_number_is_kept_and_warned_of(tmp_path: Path) -> None:
    results = side([{}]) | {
        "results": {"task": {"acc,none": 1.0, "acc_stderr,none": "N/A", "f1,none": "N/A", "sample_len": 1}},
        "higher_is_better": {},
    }
    rows = list(harness._paired("task", results, results))
    found = list(harness._scores("task", results, results, rows, spec(tmp_path / "out", STORIES, None, "task")))
    assert [(one.metric, one.is_number) for one in found] == [("acc", True), ("f1", False)]
    [verdict] = harness_verdicts(harness_scores().model_copy(update={"tasks": tuple(found)}))
    assert "task f1 is no number" in str(verdict.value)


def test_what_running_tasks_leaves_in_their_folder_is_no_other_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0.4.13")  # It may not be installed here.
    (tmp_path / "task.yaml").write_text("task: one\n")
    section = declared(include_path=str(tmp_path)).harness
    before = module.harness_identity(section)
    for name in ("__pycache__/utils.cpython-311.pyc", ".git/index", "more/.ipynb_checkpoints/task.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"left")
    assert module.harness_identity(section) == before
    (tmp_path / "more" / "utils.py").write_text("def f(): ...\n")
    assert module.harness_identity(section) != before
