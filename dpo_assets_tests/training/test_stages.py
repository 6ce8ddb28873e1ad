"""The stages as processes, started by hand: `python -m dpo_assets.training <stage> --spec spec.json`, no Dagster."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_assets.artifact import MANIFEST, Artifact, open_artifact
from dpo_assets.contract import (
    EXPLAINED_EXIT,
    FAILURE_FILE,
    EvaluateSpec,
    Failure,
    MergeSpec,
    Spec,
    TokenizeSpec,
    TrainSpec,
    parse_progress,
)
from dpo_assets.errors import CorruptArtifact
from dpo_assets.feedback.screening import Screened
from dpo_assets.feedback.trained import TRAINED_GROUPS, trained_groups
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.__main__ import main
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.trainers.packed import LOGGED_STEPS
from dpo_assets_tests.training.conftest import EVAL_PAIRS, MAX_LENGTH, TRAIN_PAIRS, PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import summed_logps

PATIENCE = 300.0  # Seconds; a stage of these takes a few, most of them imports.
GENERATIONS, NEW_TOKENS = 4, 16


def command(stage: str, spec: Spec, folder: Path, *more: str) -> list[str]:
    """The command line of a stage, its spec written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    return [sys.executable, "-m", "dpo_assets.training", stage, "--spec", str(folder / "spec.json"), *more]


def environment(scratch: Path) -> dict[str, str]:
    """What a person's shell would have; the settings of this test process do not reach the stage."""
    scratch.mkdir(parents=True, exist_ok=True)
    mine = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "DAGSTER_"))
    }
    return mine | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}


@dataclass(frozen=True)
class Bench:
    """Where stages run: their outputs, their specs, and a temporary folder of their own."""

    root: Path

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def output(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder

    def run(self, stage: str, spec: Spec) -> subprocess.CompletedProcess[str]:
        line = command(stage, spec, self.root / "specs" / spec.output_dir.name)
        return subprocess.run(
            line, env=environment(self.scratch), capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def make(self, stage: str, spec: Spec) -> Artifact:
        done = self.run(stage, spec)
        assert done.returncode == 0, done.stderr
        return open_artifact(spec.output_dir)


@dataclass(frozen=True)
class Pipeline:
    """Every artefact of one pipeline, each made by a process of its own, and SFT once more."""

    bench: Bench
    plan: TrainingPlan
    tokens: Artifact
    sft: Artifact
    sft_again: Artifact
    dpo: Artifact
    merged: Artifact
    scores: Artifact

    @property
    def artifacts(self) -> list[Artifact]:
        return [self.tokens, self.sft, self.sft_again, self.dpo, self.merged, self.scores]


@pytest.fixture(scope="session")
def pipeline(
    plan_for: PlanMaker, screened: Screened, model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    bench = Bench(tmp_path_factory.mktemp("stages"))
    plan = plan_for(lora={"dropout": 0.05})
    pairs = bench.root / "pairs.parquet"
    screened.pairs.head(40).write_parquet(pairs)

    def common(name: str, **inputs: str) -> dict[str, Any]:
        return {"output_dir": bench.output(name), "fingerprint": name, "inputs": inputs, "base_model": model_folder}

    def train_spec(name: str, **more: Any) -> TrainSpec:
        return TrainSpec(**common(name, dpo_dataset="d" * 64), dataset=dataset, plan=plan, **more)

    tokens = bench.make("tokenize", TokenizeSpec(**common("tokens"), pairs=pairs))
    sft = bench.make("sft", train_spec("sft"))
    # In this process, so with other hash seeds and a random state that other tests have left behind.
    again = command("sft", train_spec("sft-again"), bench.root / "specs" / "sft-again")[3:]
    assert main(again) == 0
    sft_again = open_artifact(bench.root / "sft-again")
    cache = bench.root / "cache" / "reference.sqlite"
    dpo = bench.make("dpo", train_spec("dpo", start_adapter=sft.path / "adapter", reference_cache=cache))
    merge = MergeSpec(
        **common("merged", dpo_adapter=dpo.digest), adapter=dpo.path / "adapter", dataset=dataset, plan=plan
    )
    merged = bench.make("merge", merge)
    evaluate = EvaluateSpec(
        **common("scores", merged_model=merged.digest),
        dataset=dataset,
        plan=plan,
        sft_adapter=sft.path / "adapter",
        policy=merged.path / "model",
        confidence=0.95,
        generations=GENERATIONS,
        max_new_tokens=NEW_TOKENS,
        min_pairs=5,
    )
    scores = bench.make("evaluate", evaluate)
    return Pipeline(bench, plan, tokens, sft, sft_again, dpo, merged, scores)


# --- what the stages leave behind ---------------------------------------------------------------------------------


def test_every_stage_seals_its_artefact(pipeline: Pipeline) -> None:
    kinds = [artifact.manifest.kind for artifact in pipeline.artifacts]
    assert kinds == ["tokenize", "sft", "sft", "dpo", "merge", "evaluate"]
    assert [artifact.fingerprint for artifact in pipeline.artifacts][1:3] == ["sft", "sft-again"]
    assert pipeline.merged.manifest.inputs == {"dpo_adapter": pipeline.dpo.digest}
    for artifact in pipeline.artifacts:
        assert {"dpo_assets", "torch", "transformers", "trl", "peft"} <= set(artifact.manifest.versions)


def test_no_stage_leaves_the_trainers_own_folder(pipeline: Pipeline) -> None:
    assert not [path for artifact in pipeline.artifacts for path in artifact.path.rglob("trainer")]


def test_no_stage_leaves_anything_in_the_temporary_folder(pipeline: Pipeline) -> None:
    """The dataset cache is as large as the dataset; a service that trains every night must not collect them."""
    assert sorted(path.name for path in pipeline.bench.scratch.iterdir()) == []


def test_equal_inputs_give_an_equal_sft_digest(pipeline: Pipeline) -> None:
    first, second = pipeline.sft.manifest.files, pipeline.sft_again.manifest.files
    different = sorted(name for name in first if name != "timings.json" and first[name] != second.get(name))
    assert different == []
    assert pipeline.sft.digest == pipeline.sft_again.digest


def test_token_ids_are_those_the_dataset_was_made_with(pipeline: Pipeline, dataset: Path) -> None:
    by_stage = pl.read_parquet(pipeline.tokens.path / "tokens.parquet")
    assert by_stage.height == 40
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    joined = pl.read_parquet(dataset / "train.parquet").join(by_stage, on="pair_id", suffix="_stage")
    assert joined.height > 0
    for name in ids:
        assert joined[name].to_list() == joined[f"{name}_stage"].to_list()


def test_a_trained_model_keeps_the_groups_of_its_training_pairs(pipeline: Pipeline, dataset: Path) -> None:
    groups = set(pl.read_parquet(dataset / "train.parquet")["group_id"])
    for artifact in (pipeline.sft, pipeline.dpo):
        assert TRAINED_GROUPS in artifact.manifest.files
        assert set(trained_groups(artifact.path / TRAINED_GROUPS)) == groups
    assert TRAINED_GROUPS not in pipeline.merged.manifest.files


def test_training_is_reported_line_by_line(pipeline: Pipeline) -> None:
    for artifact, steps in ((pipeline.sft, pipeline.plan.sft_steps), (pipeline.dpo, pipeline.plan.dpo_steps)):
        rows = [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        report = artifact.json("report.json")
        assert report["steps"] == steps
        assert report["finite"] is True
    assert (
        pipeline.sft.json("report.json")["held_out_nll_after"] < pipeline.sft.json("report.json")["held_out_nll_before"]
    )
    assert pipeline.sft.json("report.json")["ends_with_eos"] == 1.0
    assert pipeline.dpo.json("report.json")["first_loss"] == pytest.approx(0.6931472, abs=5e-4)


def test_only_the_trained_adapter_is_saved(pipeline: Pipeline) -> None:
    for artifact in (pipeline.sft, pipeline.dpo):
        names = sorted(p.relative_to(artifact.path).as_posix() for p in (artifact.path / "adapter").rglob("*"))
        assert names == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def test_dpo_goes_on_from_the_sft_adapter_and_moves_it(pipeline: Pipeline, model_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, pipeline.sft.path / "adapter")
    model.load_adapter(pipeline.dpo.path / "adapter", adapter_name="dpo")
    weights = dict(model.named_parameters())
    moves = [
        float((weights[name.replace(".default.", ".dpo.")] - value).abs().max())
        for name, value in weights.items()
        if ".default." in name
    ]
    assert moves
    assert 0 < max(moves) < 0.1  # A few small steps from SFT, not a new adapter.


@pytest.fixture(scope="session")
def merged_model(pipeline: Pipeline) -> Any:
    """The release as anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(pipeline.merged.path / "model", dtype=torch.float32).eval()


def test_the_merged_model_loads_plainly_and_scores_as_the_adapter_does(
    pipeline: Pipeline, merged_model: Any, model_folder: Path, dataset: Path
) -> None:
    held_out = [dpo_group(row, MAX_LENGTH) for row in load_split(dataset, "eval")]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, pipeline.dpo.path / "adapter").eval()
    by_adapter = summed_logps(adapter, held_out)
    assert summed_logps(merged_model, held_out) == pytest.approx(by_adapter, abs=2e-3)
    with adapter.disable_adapter():
        assert summed_logps(adapter, held_out) != pytest.approx(by_adapter, abs=1.0)
    report = pipeline.merged.json("report.json")
    assert report["finite"] is True
    assert report["probe_pairs"] == EVAL_PAIRS
    assert report["parameters"] == sum(p.numel() for p in merged_model.parameters())
    assert report["max_difference_per_token"] < 1e-4


def test_the_merged_model_names_nothing_of_this_project(pipeline: Pipeline) -> None:
    folder = pipeline.merged.path / "model"
    assert "packed_rows" not in (folder / "config.json").read_text()
    assert (folder / "model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.chat_template
    assert not list(folder.glob("adapter*"))


def test_the_merged_model_ends_its_answers_by_default_where_training_ended_them(
    pipeline: Pipeline, merged_model: Any
) -> None:
    """Whoever calls `generate()` without arguments relies on this file: another EOS there is an answer without end."""
    tokenizer = AutoTokenizer.from_pretrained(pipeline.merged.path / "model", local_files_only=True)
    ends = merged_model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_held_out_scores_are_those_of_the_two_models(
    pipeline: Pipeline, merged_model: Any, model_folder: Path, dataset: Path
) -> None:
    held_out = [dpo_group(row, MAX_LENGTH) for row in load_split(dataset, "eval")]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    sft = summed_logps(PeftModel.from_pretrained(base, pipeline.sft.path / "adapter").eval(), held_out)
    policy = summed_logps(merged_model, held_out)
    table = pl.read_parquet(pipeline.scores.path / "scores.parquet")
    assert table["pair_id"].to_list() == pl.read_parquet(dataset / "eval.parquet")["pair_id"].to_list()
    for name, theirs in (("sft", sft), ("policy", policy)):
        assert table[f"{name}_chosen"].to_list() == pytest.approx(theirs[::2], abs=2e-3)
        assert table[f"{name}_rejected"].to_list() == pytest.approx(theirs[1::2], abs=2e-3)
    margins = [(p - s) - (q - t) for p, q, s, t in zip(policy[::2], policy[1::2], sft[::2], sft[1::2], strict=True)]
    report = pipeline.scores.json("report.json")
    assert report["margin_mean_nats"] == pytest.approx(sum(margins) / len(margins), abs=1e-2)
    assert report["pairs"] == EVAL_PAIRS


def test_the_generation_report_compares_sft_and_policy(pipeline: Pipeline) -> None:
    health = pipeline.scores.json("report.json")["generation"]
    assert health.pop("champion") is None
    assert set(health) == {"sft", "policy"}
    shares = ("repetition", "no_eos", "empty", "distinct_1", "distinct_2", "longest_repeat", "marks")
    for who in health.values():
        assert set(who) == {"answers", "mean_tokens", *shares}
        assert who["answers"] == GENERATIONS
        assert all(0.0 <= who[name] <= 1.0 for name in shares)
        assert who["mean_tokens"] <= NEW_TOKENS
    answers = pipeline.scores.json("generations.json")
    assert len(answers) == GENERATIONS
    assert all(set(row) == {"prompt", "sft", "policy"} for row in answers)


# --- how a stage ends ---------------------------------------------------------------------------------------------


@contextmanager
def started(line: list[str], scratch: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A stage in a process group of its own; nothing of it is left afterwards."""
    process = subprocess.Popen(
        line,
        env=environment(scratch),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.wait()


def wait_for_progress(process: subprocess.Popen[str], stage: str) -> None:
    """Returns in the midst of a stage."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        progress = parse_progress(line)
        if progress is not None and progress.stage == stage and progress.done < progress.total:
            return
    pytest.fail("the stage ended before it was half-way:\n" + "".join(seen))


@pytest.fixture
def endless(plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path) -> TrainSpec:
    """An SFT stage of minutes, which logs every step: each pair takes a forward of its own."""
    plan = plan_for(sft={"epochs": 130.0}, token_budget=1)
    assert 300 < plan.sft_steps < 2 * LOGGED_STEPS
    return train_spec(plan, tmp_path / "out")


def test_a_stage_that_follows_its_parent_ends_with_its_whole_group_when_stdin_closes(
    endless: TrainSpec, tmp_path: Path
) -> None:
    line = command("sft", endless, tmp_path / "spec", "--follow-parent")
    # The shell becomes the worker and leaves it a child, which holds the worker's standard output open.
    with started(["sh", "-c", 'sleep 3600 & exec "$@"', "sh", *line], tmp_path / "scratch") as process:
        wait_for_progress(process, "sft")
        assert process.poll() is None
        process.communicate(timeout=60)  # Closes stdin, and reads until nobody holds the other end of stdout.
        assert process.returncode == -signal.SIGKILL
    # Killed half-way: what it leaves is not an artefact.
    assert not list(endless.output_dir.rglob(f"{MANIFEST}*"))
    with pytest.raises(CorruptArtifact, match="did not finish"):
        open_artifact(endless.output_dir)


def test_a_stage_that_follows_nobody_is_not_ended_by_a_closed_stdin_and_leaves_no_manifest_when_killed(
    endless: TrainSpec, tmp_path: Path
) -> None:
    with started(command("sft", endless, tmp_path / "spec"), tmp_path / "scratch") as process:
        assert process.stdin is not None
        process.stdin.close()
        wait_for_progress(process, "sft")
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert not list(endless.output_dir.rglob(f"{MANIFEST}*"))
    with pytest.raises(CorruptArtifact, match="did not finish"):
        open_artifact(endless.output_dir)


def test_a_failed_gate_exits_with_its_explanation_beside_the_spec(
    pipeline: Pipeline, plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference that is not the start of training. As a process it ends the demo that is broken on purpose."""
    plan = plan_for(dpo={"reference": "base"})
    spec = train_spec(plan, tmp_path / "out", start_adapter=pipeline.sft.path / "adapter")
    assert main(command("dpo", spec, tmp_path / "spec")[3:]) == EXPLAINED_EXIT
    failure = Failure.model_validate_json((tmp_path / "spec" / FAILURE_FILE).read_bytes())
    assert (failure.kind, failure.check) == ("gate", "reference_is_start")
    assert isinstance(failure.value, float)
    assert abs(failure.value - 0.6931) > 5e-4
    assert "0.6931" in failure.band
    assert "dpo.reference" in failure.fix
    said = capsys.readouterr().err
    assert failure.message in said
    assert "Traceback" not in said
    assert not (spec.output_dir / MANIFEST).exists()


def test_a_choice_that_cannot_work_exits_as_a_fault_of_configuration(
    plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    spec = train_spec(plan_for(dpo={"trainer": "trl"}), tmp_path / "out")
    stage, *options = command("dpo", spec, tmp_path / "spec")[3:]
    assert main([stage, *options]) == EXPLAINED_EXIT
    failure = Failure.model_validate_json((tmp_path / "spec" / FAILURE_FILE).read_bytes())
    assert failure.kind == "config"
    assert "needs a GPU" in failure.message
    assert not (spec.output_dir / MANIFEST).exists()


def test_an_output_folder_that_was_used_before_is_refused_and_kept(
    screened: Screened, model_folder: Path, tmp_path: Path
) -> None:
    """By hand a stage is easily started twice; the second run must not damage what the first one sealed."""
    screened.pairs.head(3).write_parquet(tmp_path / "pairs.parquet")
    out = tmp_path / "out"
    out.mkdir()
    common = {"output_dir": out, "inputs": {}, "base_model": model_folder}
    spec = TokenizeSpec(**common, fingerprint="f", pairs=tmp_path / "pairs.parquet")
    line = command("tokenize", spec, tmp_path / "spec")[3:]
    assert main(line) == 0
    assert gc.isenabled(), "a stage collects its garbage, other than its imports"
    sealed = open_artifact(out).digest
    assert main(line) == EXPLAINED_EXIT
    assert open_artifact(out).digest == sealed


def test_the_dataset_has_what_these_tests_rely_on(dataset: Path) -> None:
    train, held_out = load_split(dataset, "train"), load_split(dataset, "eval")
    assert (len(train), len(held_out)) == (TRAIN_PAIRS, EVAL_PAIRS)
    cut = [len(row["prompt_ids"]) + len(row["chosen_ids"]) > MAX_LENGTH for row in train]
    assert any(cut)
    assert not all(cut)
