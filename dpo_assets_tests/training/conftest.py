"""What the worker's tests share: the built-in model, a small dataset made by the project's own rooms, and plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from dpo_assets.contract import TokenizeSpec, TrainSpec
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.screening import Screened, screen
from dpo_assets.feedback.sources import files_of
from dpo_assets.feedback.splits import fit_to_model, split
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.planning.model_folder import inspect_model
from dpo_assets.planning.plan import DatasetStats, TrainingPlan, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.recipe import FeedbackSource, parse_recipe
from dpo_assets.training.batches.data import dpo_group, load_split
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.chat_format import ChatFormat, load_chat_format
from dpo_assets.training.stages import sft, tokenize

MAX_LENGTH = 192
TRAIN_PAIRS, EVAL_PAIRS = 24, 10
PlanMaker = Callable[..., TrainingPlan]
SpecMaker = Callable[..., TrainSpec]

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


class Log:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(autouse=True)
def _no_trace_in_torch() -> Iterator[None]:
    """Training seeds torch's generators; the tests after it must not depend on that."""
    state = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(state)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The real 260k-parameter model that is part of the package."""
    return Path(str(files("dpo_assets") / "data" / "stories260k"))


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)


@pytest.fixture(scope="session")
def chat(model_folder: Path) -> ChatFormat:
    return load_chat_format(model_folder)


@pytest.fixture(scope="session")
def screened() -> Screened:
    """Real OpenAssistant pairs, read and screened as the pipeline does it."""
    options = ReadOptions(pairing="best_worst", include_synthetic=False)
    batches = [read_file(f, options) for f in files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])]
    pairs = [pair for batch in batches for pair in batch.pairs]
    rejected = [row for batch in batches for row in batch.rejected]
    return screen(pairs_frame(pairs), quarantine_frame(rejected))


@pytest.fixture(scope="session")
def prepared(
    screened: Screened, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(train, eval) with every pair that fits the model: more than the small dataset below takes."""
    out = tmp_path_factory.mktemp("tokens")
    source = out / "pairs.parquet"
    screened.pairs.write_parquet(source)
    common: dict[str, Any] = {"output_dir": out, "fingerprint": "f" * 32, "inputs": {}, "base_model": model_folder}
    tokenize.run(TokenizeSpec(**common, pairs=source), Log())
    accepted, _ = fit_to_model(screened.pairs, pl.read_parquet(out / "tokens.parquet"), MAX_LENGTH)
    return split(accepted, 0.3, 0)


@pytest.fixture(scope="session")
def dataset(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder as the stages read it, small enough for seconds."""
    folder = tmp_path_factory.mktemp("dataset")
    for name, pairs, count in zip(("train", "eval"), prepared, (TRAIN_PAIRS, EVAL_PAIRS), strict=True):
        small_part(pairs, count).write_parquet(folder / f"{name}.parquet")
    return folder


def small_part(pairs: pl.DataFrame, count: int) -> pl.DataFrame:
    """`count` pairs in pair_id order: first those with an answer that truncation leaves whole, which are the fewer."""
    room = MAX_LENGTH - pl.col("prompt_ids").list.len().cast(pl.Int64)
    fits = [pl.col(answer).list.len().cast(pl.Int64) <= room for answer in ("chosen_ids", "rejected_ids")]
    whole = pairs.with_columns(whole=fits[0] | fits[1]).sort("whole", descending=True, maintain_order=True)
    return whole.head(count).drop("whole").sort("pair_id")


@pytest.fixture(scope="session")
def groups(dataset: Path) -> list[Group]:
    """The training pairs, truncated as in training."""
    return [dpo_group(row, MAX_LENGTH) for row in load_split(dataset, "train")]


@pytest.fixture(scope="session")
def plan_for(model_folder: Path, groups: list[Group]) -> PlanMaker:
    """Plans of this dataset on a CPU: `plan_for(dpo={"beta": 0.2}, token_budget=300)`."""
    sizes = [group.tokens for group in groups]
    stats = DatasetStats(
        train_pairs=len(groups),
        eval_pairs=EVAL_PAIRS,
        max_length=MAX_LENGTH,
        longest_pair=max(sizes),
        mean_pair=sum(sizes) / len(sizes),
    )
    shape = inspect_model(model_folder).shape
    sections: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4, "alpha": 8},
        "sft": {"learning_rate": 5e-3, "batch_size": 8, "epochs": 2.0},
        "dpo": {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1.0},
    }

    def make(
        lora: Mapping[str, Any] = {}, sft: Mapping[str, Any] = {}, dpo: Mapping[str, Any] = {}, **resolved: Any
    ) -> TrainingPlan:
        recipe = parse_recipe(
            {
                "base_model": {"source": "builtin:stories260k"},
                "feedback": {"sources": [{"path": "builtin:oasst", "format": "oasst_tree"}], "max_length": MAX_LENGTH},
                "lora": {**sections["lora"], **lora},
                "sft": {**sections["sft"], **sft},
                "dpo": {**sections["dpo"], **dpo},
            }
        )
        return make_plan(recipe, shape, stats, Device("cpu", "CPU", 4.0)).model_copy(update=resolved)

    return make


@pytest.fixture(scope="session")
def train_spec(model_folder: Path, dataset: Path) -> SpecMaker:
    """Specs of a training stage: `train_spec(plan, output_dir, start_adapter=...)`."""

    def make(plan: TrainingPlan, output_dir: Path, **more: Any) -> TrainSpec:
        output_dir.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": model_folder, "dataset": dataset}
        return TrainSpec(output_dir=output_dir, plan=plan, **(values | more))

    return make


@pytest.fixture(scope="session")
def sft_adapter(plan_for: PlanMaker, train_spec: SpecMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that SFT really trained, with dropout, so that it differs from its base."""
    out = tmp_path_factory.mktemp("sft")
    sft.run(train_spec(plan_for(lora={"dropout": 0.1}), out), Log())
    return out / "adapter"
