"""The seam between Dagster and the worker: typed specs in, one artefact directory out, progress lines between.

`python -m dpo_assets.training <stage> --spec spec.json` runs the same by hand as from an asset.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.planning.plan import TrainingPlan

Stage = Literal["tokenize", "sft", "dpo", "merge", "evaluate"]
FAILURE_FILE = "failure.json"
# Exit status of a worker that explains itself in FAILURE_FILE. Any other non-zero status is an infrastructure failure.
EXPLAINED_EXIT = 65


class Spec(BaseModel):
    """What every stage is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str = Field(default="", description="What the artefact is called; default: the stage.")
    output_dir: Path = Field(description="Empty directory that becomes the artefact; its manifest is written last.")
    fingerprint: str
    inputs: dict[str, str] = Field(description="Digests of the artefacts this one is made from.")
    base_model: Path = Field(description="Folder of the base model and its tokenizer.")
    threads: int = 1


class TokenizeSpec(Spec):
    """Token ids of prompt, chosen and rejected for each pair of a Parquet file."""

    pairs: Path
    max_length: int


class TrainSpec(Spec):
    """One training stage on a prepared dataset."""

    dataset: Path
    plan: TrainingPlan
    start_adapter: Path | None = None
    reference_cache: Path | None = None
    base_digest: str = ""
    tokenizer_digest: str = ""


class MergeSpec(Spec):
    """Base + adapter as one model, and the proof that it is the same policy."""

    adapter: Path
    dataset: Path
    plan: TrainingPlan
    probe_pairs: int = 32


class EvaluateSpec(Spec):
    """Held-out scores of the SFT policy and the merged policy."""

    dataset: Path
    plan: TrainingPlan
    sft_adapter: Path | None
    policy: Path
    confidence: float
    generations: int
    max_new_tokens: int
    min_pairs: int


class Failure(BaseModel):
    """Why a worker stopped, for the asset to show. `gate` failures carry the check they failed."""

    kind: Literal["config", "gate"]
    message: str
    check: str = ""
    value: float | str = ""
    band: str = ""
    source: str = ""
    fix: str = ""


class Progress(BaseModel):
    """One line of progress in a run's log: readable by people, and by whoever draws a bar from it."""

    stage: str
    done: int
    total: int
    note: str = ""

    def line(self) -> str:
        note = " ".join(self.note.splitlines())
        return f"[progress] {self.stage} {self.done}/{self.total}" + (f" {note}" if note else "")


_PROGRESS = re.compile(r"\[progress\] (?P<stage>\w+) (?P<done>\d+)/(?P<total>\d+)(?: (?P<note>.*))?")


def parse_progress(line: str) -> Progress | None:
    """The progress in a log line, or None."""
    found = _PROGRESS.search(line)
    if found is None:
        return None
    return Progress(stage=found["stage"], done=int(found["done"]), total=int(found["total"]), note=found["note"] or "")
