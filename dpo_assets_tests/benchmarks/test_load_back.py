"""Releases in an environment with an earlier Transformers. It needs an interpreter of one: `EARLIER_TRANSFORMERS`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import load_back_files
from benchmarks.load_back import EXACT, run

PYTHON = os.environ.get("EARLIER_TRANSFORMERS", "")


EARLIER = pytest.mark.skipif(
    not PYTHON, reason="set EARLIER_TRANSFORMERS to an interpreter with transformers 4.57, torch, safetensors and peft"
)


@EARLIER
def test_a_release_answers_by_its_folder_alone_under_an_earlier_transformers(tmp_path: Path) -> None:
    version, rows = load_back_files.run(PYTHON, tmp_path)
    assert version.startswith("4.")
    assert [(row.base, row.artifact, row.why_not, row.differs) for row in rows if row.why_not or row.differs] == []
    assert {row.artifact for row in rows} == {"merged", "adapter"}


@EARLIER
def test_a_release_is_the_same_model_to_an_earlier_transformers(tmp_path: Path) -> None:
    version, rows = run(PYTHON, tmp_path)
    assert version.startswith("4.")
    assert [row.name for row in rows if not row.holds] == []
    told = {row.name: row for row in rows}
    for name in ("llama", "gemma3", "mistral3", "gpt_oss", "qwen3_moe"):
        assert told[name].made_by == version
        assert "rope_parameters" not in told[name].keys
        assert told[name].there is not None
    # That the gauge sees a config which the other one misreads: the base's own. The release says it in both forms.
    misread = told["llama, saved by 5"]
    assert misread.base_there is not None
    assert misread.base_there > EXACT
