"""The seam between Dagster and the worker: specs are strict, progress lines read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_assets.contract import (
    BenchmarkSpec,
    EvaluateSpec,
    Failure,
    HarnessSpec,
    Progress,
    RewardSpec,
    Spec,
    Stage,
    TokenizeSpec,
    TrainSpec,
    parse_progress,
)
from dpo_assets_tests.samples import plan

_counts = st.integers(0, 10**9)
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_one_line = _text.filter(lambda text: text.splitlines() in ([], [text]))
_stages = st.sampled_from(get_args(Stage))


@settings(max_examples=60, deadline=None)
@given(stage=_stages, done=_counts, total=_counts, note=_one_line)
def test_a_progress_line_reads_back(stage: str, done: int, total: int, note: str) -> None:
    progress = Progress(stage=stage, done=done, total=total, note=note)
    assert parse_progress(progress.line()) == progress
    assert parse_progress(f"2025-01-01 12:00:00 +0000 - dagster - INFO - {progress.line()}") == progress


@settings(max_examples=60, deadline=None)
@given(note=_text)
@example(note="loss 0.1\nlr 0.2\r\n")
def test_progress_stays_one_line_whatever_its_note_holds(note: str) -> None:
    line = Progress(stage="sft", done=1, total=2, note=note).line()
    assert line.splitlines() == [line]
    found = parse_progress(line)
    assert found is not None
    assert found.note.split() == note.split()


@pytest.mark.parametrize(
    "line",
    ["", "loss 0.5", "[progress]", "[progress] sft", "[progress] sft 1", "[progress] sft 1/", "[progress] sft -1/2"],
)
def test_a_line_without_progress_is_none(line: str) -> None:
    assert parse_progress(line) is None


SPEC = {"output_dir": "/out", "fingerprint": "0" * 32, "inputs": {}, "base_model": "/base"}


def test_a_spec_reads_back_from_the_json_that_the_worker_is_given() -> None:
    train = TrainSpec.model_validate(SPEC | {"dataset": "/data", "plan": plan()})
    assert TrainSpec.model_validate_json(train.model_dump_json()) == train
    assert train.plan == plan()
    tokenize = TokenizeSpec.model_validate(SPEC | {"pairs": "/pairs.parquet"})
    assert TokenizeSpec.model_validate_json(tokenize.model_dump_json()).pairs == Path("/pairs.parquet")


@pytest.mark.parametrize("spec", [Spec, TokenizeSpec, TrainSpec, EvaluateSpec, RewardSpec, BenchmarkSpec, HarnessSpec])
def test_a_spec_with_a_key_it_does_not_know_is_refused(spec: type[Spec]) -> None:
    with pytest.raises(ValidationError, match=r"token\n\s+Extra inputs are not permitted"):
        spec.model_validate(SPEC | {"token": "x"})


def test_a_harness_that_ran_out_of_memory_takes_fewer_requests_and_no_other_budget() -> None:
    """lm-eval makes its own forwards: half the token budget changed nothing, three times."""
    values: dict[str, Any] = {
        "plan": plan(), "sft_adapter": None, "policy": "/policy", "tasks": ["one"], "include_path": None,
        "limit": None, "num_fewshot": None, "apply_chat_template": False, "batch_size": 5, "confidence": 0.95,
    }  # fmt: skip
    first = HarnessSpec.model_validate(SPEC | values)
    second = first.smaller_forwards()
    assert second is not None
    assert (second.batch_size, second.out_of_memory_retries, second.plan) == (2, 1, first.plan)
    assert HarnessSpec.model_validate(SPEC | values | {"batch_size": 1}).smaller_forwards() is None


def test_a_failure_reads_back_with_the_check_that_stopped_it() -> None:
    failure = Failure(kind="gate", message="first loss", check="reference_is_start", value=0.9, band="ln 2", fix="x")
    assert Failure.model_validate_json(failure.model_dump_json()) == failure
