"""Supervised fine-tuning: a step's loss is the mean over its completion tokens, however it is cut into forwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.stages import sft
from dpo_assets.training.stages.sft import share_ending_with
from dpo_assets_tests.training.conftest import TRAIN_PAIRS, Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import summed_logps

History = list[dict[str, float]]


def run(train_spec: SpecMaker, plan: TrainingPlan, folder: Path, **more: Any) -> tuple[History, dict[str, Any]]:
    """(logged steps, report) of stage `sft`."""
    sft.run(train_spec(plan, folder, **more), Log())
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return [json.loads(line) for line in lines], report


def test_the_loss_of_a_step_is_the_mean_over_its_completion_tokens(
    model_folder: Path, groups: list[Group], plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path
) -> None:
    """One step over all pairs, in several forwards; prompts and rejected answers do not count."""
    plan = plan_for(sft={"batch_size": TRAIN_PAIRS, "epochs": 1.0}, token_budget=900)
    history, report = run(train_spec, plan, tmp_path / "out")
    chosen = [Group(group.prompt, group.completions[:1]) for group in groups]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected = -sum(summed_logps(base, chosen)) / sum(len(group.completions[0]) for group in chosen)
    assert [row["step"] for row in history] == [1]
    assert history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    # A single step has no warm-up.
    assert report["held_out_nll_after"] < report["held_out_nll_before"] - 0.05


def test_memory_settings_change_no_loss(plan_for: PlanMaker, train_spec: SpecMaker, tmp_path: Path) -> None:
    plan = plan_for(sft={"epochs": 1.0})
    expected, _ = run(train_spec, plan, tmp_path / "expected")
    changes: list[dict[str, Any]] = [{"token_budget": 1}, {"gradient_checkpointing": True, "recomputed_layers": 3}]
    for change in changes:
        history, report = run(train_spec, plan.model_copy(update=change), tmp_path / next(iter(change)))
        assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
        assert report["held_out_nll_after"] < report["held_out_nll_before"]


def test_training_goes_on_from_an_adapter_that_has_dropout(
    plan_for: PlanMaker, train_spec: SpecMaker, sft_adapter: Path, tmp_path: Path
) -> None:
    """Dropout belongs to training: it may not reach the probes before it, which compare two forwards."""
    before = json.loads((sft_adapter.parent / "report.json").read_text(encoding="utf-8"))
    _, report = run(train_spec, plan_for(), tmp_path / "out", start_adapter=sft_adapter)
    assert report["held_out_nll_before"] == pytest.approx(before["held_out_nll_after"], abs=1e-5)


def test_an_answer_ends_with_eos_even_when_the_template_ends_the_line_after_it() -> None:
    assert share_ending_with([[5, 2], [5, 2, 13], [5, 6], [2, 5, 6]], {2}) == 0.5
    assert share_ending_with([[5, 2], [5, 3], [5, 4], [5]], {2, 3}) == 0.5, "any token that ends a turn"
    assert share_ending_with([], {2}) == 0.0
