"""The worker's imports, in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
STAGES = ("tokenize", "sft", "dpo", "merge", "evaluate")


def imported_by(*modules: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after importing `modules`."""
    line = [sys.executable, "-c", PROBE, *modules]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def worker() -> set[str]:
    return imported_by("dpo_assets.training.__main__", *(f"dpo_assets.training.stages.{stage}" for stage in STAGES))


def test_the_worker_imports_no_dagster(worker: set[str]) -> None:
    assert "torch" in worker
    assert not [name for name in worker if name.startswith("dagster") and name != "dagster_pipes"]


def test_the_worker_reaches_dagster_pipes_only_inside_a_dagster_run(worker: set[str]) -> None:
    assert "dagster_pipes" not in worker


def test_the_worker_needs_neither_unsloth_nor_triton(worker: set[str]) -> None:
    assert not worker & {"unsloth", "unsloth_zoo", "triton", "bitsandbytes"}


def test_the_module_that_tokenizes_imports_no_trainer() -> None:
    """A refresh tokenizes before it knows whether anything is to be trained."""
    assert not {"peft", "trl", "datasets"} & imported_by("dpo_assets.training.stages.tokenize")
