"""One run of the grid: stage `dpo` of the worker, in this process, with its states kept for later scoring.

The guard of the pipeline watches and records; it does not stop, since a run's label must be that of the unguarded run.
Snapshots of the adapter every few steps let any rule be scored afterwards, with the state that it would have kept.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.collapse import grid_faults as faults
from benchmarks.collapse import world

ANY_FOLDER = Path("collapse-grid")  # Where no file is read.
BATCH, EPOCHS = 16, 1.25
RANK = 8
SNAPSHOT_EVERY = 4
PROBES_AFTER = 2
RATES = (0.1, 1.0, 10.0, 100.0, 1000.0)
BETAS = (0.1, 0.01, 0.5)
SEEDS = (0, 1)
# x1, from a sweep on clean data of a seed that the grid lacks (7): at 3e-4 style A rises from 0.47 to 0.82 and 0.995 of
# the facts stay; at 1e-4 it reaches 0.58, at 1e-3 0.995 with 0.974 of the facts. At 3e-3 nothing is left.
REFERENCE_RATE = 3e-4
# Stopped by a check of `dpo_dataset`, before there is anything to train; nor is a label needed.
UNTRAINED = (faults.LEAKED, faults.TRUNCATED)
KEPT = frozenset({
    "step", "loss", "grad_norm", "nll_ratio", "chosen_nats_per_token", "mean_token_accuracy", "entropy",
})  # fmt: skip
SFT_STEPS_RATE = 2e-3  # Of the adapter that `wrong_reference` starts from.


@dataclass(frozen=True)
class Cell:
    """A run: learning rate as a multiple of the reference rate, beta, fault of the data, seed."""

    times: float
    beta: float
    fault: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.fault}-x{self.times:g}-b{self.beta:g}-s{self.seed}"


def grid() -> list[Cell]:
    """All cells. Beta outermost: a grid that is cut off is whole for the betas it got to."""
    return [Cell(x, beta, fault, seed) for beta in BETAS for seed in SEEDS for fault in faults.FAULTS for x in RATES]


def prepare(work: Path, wanted: list[tuple[str, int]]) -> None:
    """The model, and the dataset of every (fault, seed), where they are missing."""
    model = work / "world"
    if not (model / "world.json").is_file():
        world.fit(model)
    for fault, seed in wanted:
        folder = work / "data" / f"{fault}-{seed}"
        if not folder.is_dir():
            faults.write_dataset(fault, seed, model, folder)


def plan_of(work: Path, cell: Cell, rate: float = REFERENCE_RATE) -> Any:
    """The pipeline's own plan for a cell."""
    from dpo_assets.planning.model_folder import inspect_model
    from dpo_assets.planning.plan import DatasetStats, make_plan
    from dpo_assets.planning.precision import Device
    from dpo_assets.training.batches.data import dpo_group, load_split

    data = work / "data" / f"{cell.fault}-{cell.seed}"
    groups = [dpo_group(row, world.MAX_LENGTH) for row in load_split(data, "train")]
    sizes = [group.tokens for group in groups]
    stats = DatasetStats(
        train_pairs=len(groups), eval_pairs=len(load_split(data, "eval")), max_length=world.MAX_LENGTH,
        longest_pair=max(sizes), mean_pair=sum(sizes) / len(sizes),
    )  # fmt: skip
    return make_plan(recipe_of(work, cell, rate), inspect_model(work / "world").shape, stats, Device("cpu", "CPU", 4.0))


def recipe_of(work: Path, cell: Cell, rate: float = REFERENCE_RATE) -> Any:
    """The recipe of a cell, all else at the pipeline's defaults."""
    from dpo_assets.recipe import parse_recipe

    return parse_recipe(
        {
            "base_model": {"source": str((work / "world").absolute())},
            "feedback": {"sources": [{"path": "feedback.jsonl"}], "max_length": world.MAX_LENGTH},
            "lora": {"rank": RANK, "alpha": RANK},
            "sft": {"strategy": "adopt"},
            "dpo": {
                "learning_rate": rate * cell.times,
                "beta": cell.beta,
                "batch_size": BATCH,
                "epochs": EPOCHS,
                "seed": cell.seed,
                "reference": "base" if cell.fault == faults.WRONG_REFERENCE else "sft",
            },
        }
    )


@contextmanager
def snapshots(folder: Path) -> Iterator[None]:
    """Keeps the adapter every `SNAPSHOT_EVERY` steps of the packed trainer, as `step-N.safetensors`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    from dpo_assets.training.guard.collapse import CollapseGuard
    from dpo_assets.training.trainers.dpo import PackedDPOTrainer

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % SNAPSHOT_EVERY == 0:
                tensors = {k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}
                save_file(tensors, folder / f"step-{state.global_step}.safetensors")

    train, probe = PackedDPOTrainer.train, CollapseGuard._probe

    def few(self: Any) -> dict[str, float]:
        """Probes until a rule has fired, and two more: what follows would cost most and decide nothing."""
        after = [row for row in self.rows if self.first and row["step"] >= self.first.step and "probe/answers" in row]
        return {} if len(after) > PROBES_AFTER else probe(self)

    def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Keep())
        return train(self, *args, **kwargs)

    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(PackedDPOTrainer, "train", keeping), mock.patch.object(CollapseGuard, "_probe", few):
        yield


def policy_of(work: Path, adapter: Path | None) -> Any:
    """The world's model, with an adapter if there is one, for sampling."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "world")
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def run(work: Path, cell: Cell, rate: float = REFERENCE_RATE, keep: bool = True, stops: bool = False) -> dict[str, Any]:
    """Trains a cell to its end, or to where the guard stops it, and measures what became of the model."""
    from transformers import AutoTokenizer

    from dpo_assets.checks.bands import default_bands
    from dpo_assets.contract import GuardSpec, TrainSpec
    from dpo_assets.errors import GateError
    from dpo_assets.training.stages import dpo

    if cell.fault in UNTRAINED:
        return asdict(cell)
    out = work / ("stopped" if stops else "runs") / cell.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    begun = time.perf_counter()
    plan = plan_of(work, cell, rate)
    guard = GuardSpec.of(plan, default_bands(), recipe_of(work, cell, rate).checks)
    start = sft_adapter(work, cell.seed) if cell.fault == faults.WRONG_REFERENCE else None
    spec = TrainSpec(
        output_dir=out, fingerprint="f" * 32, inputs={}, base_model=(work / "world").absolute(),
        dataset=(work / "data" / f"{cell.fault}-{cell.seed}").absolute(), plan=plan, start_adapter=start,
        reference_cache=(work / "reference.sqlite").absolute(), base_digest="world",
        guard=guard.model_copy(update={"stops": stops}),
    )  # fmt: skip
    row: dict[str, Any] = {**asdict(cell), "learning_rate": plan.dpo.learning_rate, "steps": plan.dpo_steps}
    try:
        with snapshots(out / "states"):
            dpo.run(spec, faults.Silent())
    except GateError as stopped:
        return row | {"stopped_by": stopped.check, "seconds": time.perf_counter() - begun}
    finally:
        shutil.rmtree(spec.scratch, ignore_errors=True)
    row["report"] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    row["report"].get("answers", {}).pop("examples", None)
    for name in ("source", "band", "fix"):
        (row["report"].get("trigger") or {}).pop(name, None)
    tokenizer = AutoTokenizer.from_pretrained(work / "world")
    policy = policy_of(work, out / "adapter")
    row["behaviour"] = world.measure(policy, tokenizer, seed=100 + cell.seed).as_dict()
    row["tasks"] = tasks_met(policy, tokenizer)
    row["metrics"] = columns(out / "metrics.jsonl")
    if not keep:
        shutil.rmtree(out)
    return row | {"seconds": time.perf_counter() - begun}


def state_behaviour(work: Path, cell: Cell, step: int) -> dict[str, float]:
    """The behaviour of a kept snapshot; step 0 is the start."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    folder = work / "runs" / cell.name
    tokenizer = AutoTokenizer.from_pretrained(work / "world")
    policy = policy_of(work, folder / "adapter" if step else None)
    if step:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy, load_file(folder / "states" / f"step-{step}.safetensors"))
    return world.measure(policy, tokenizer, seed=100 + cell.seed).as_dict()


def tasks_met(policy: Any, tokenizer: Any) -> str:
    """Which tasks of a user's capability probe the policy meets, greedily: a `1` or `0` a task.

    Other questions than those of the label's probe: every fact in a wording that pairs have, so of what a user would
    have at hand.
    """
    questions = [world.Question(c, a, world.PAIRED_WORDINGS[1], "") for c in world.CREATURES for a in world.VALUES]
    answers = world.sample(policy, tokenizer, questions, seed=None)
    return "".join(str(int(q.core in answer["text"])) for q, answer in zip(questions, answers, strict=True))


def columns(path: Path) -> dict[str, list[float]]:
    """The metric log by name, at three digits. `probe/` names have a value a probe, at the steps of `probe/step`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    probes = [{"probe/step": row["step"]} | row for row in rows if "probe/answers" in row]
    names = sorted({name for row in probes for name in row if name.startswith("probe/")})
    return {name: [_short(row[name]) for row in rows] for name in sorted(KEPT) if name in rows[0]} | {
        name: [_short(row[name]) for row in probes] for name in names
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def sft_adapter(work: Path, seed: int) -> Path:
    """An adapter that stage `sft` trained on chosen answers: a start that is not the base."""
    from dpo_assets.contract import TrainSpec
    from dpo_assets.training.stages import sft

    out = work / "sft" / str(seed)
    if not (out / "adapter").is_dir():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        plan = plan_of(work, Cell(1.0, 0.1, faults.WRONG_REFERENCE, seed))
        trained = plan.sft.model_copy(update={"strategy": "train", "learning_rate": SFT_STEPS_RATE})
        plan = plan.model_copy(update={"sft": trained, "sft_steps": 20})
        sft.run(
            TrainSpec(
                output_dir=out, fingerprint="f" * 32, inputs={}, base_model=(work / "world").absolute(),
                dataset=(work / "data" / f"{faults.WRONG_REFERENCE}-{seed}").absolute(), plan=plan,
            ),
            faults.Silent(),
        )  # fmt: skip
        shutil.rmtree(out / "trainer", ignore_errors=True)
    return (out / "adapter").absolute()
