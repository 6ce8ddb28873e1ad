"""Every stage of the worker on this machine's device, and what is scored as the release of a quantised run.

    python -m benchmarks.learning prepare --model MODEL_FOLDER --data FOLDER --max-length 512
    python -m benchmarks.stages --model MODEL_FOLDER --data FOLDER --out stages.jsonl --precisions bf16,4bit

SFT, DPO, merge and evaluation run as the pipeline starts them, each in a process of its own. Then held-out pairs are
scored three ways: the merged model in 16 bit, which is the release; the adapter on the base that it was trained on; and
the merged model quantised again, which nobody releases. What each is off from the release, as the mean distance of a
pair's margin, is held against how far DPO moved that margin.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.learning import ROOT
from dpo_assets.contract import EvaluateSpec, MergeSpec, Spec, Stage, TrainSpec
from dpo_assets.planning.plan import TrainingPlan

LENGTH = 512
SFT = {"learning_rate": 2e-3, "epochs": 1.0, "batch_size": 8}
DPO = {"learning_rate": 2e-4, "epochs": 1.0, "batch_size": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("stages.jsonl"))
    parser.add_argument("--precisions", default="auto")
    parser.add_argument("--kernels", default="auto")
    args = parser.parse_args()
    for precision in args.precisions.split(","):
        with tempfile.TemporaryDirectory(prefix="stages-") as scratch:
            row = run(args, precision, Path(scratch))
        print(json.dumps(row), flush=True)
        with args.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def run(args: argparse.Namespace, precision: str, work: Path) -> dict[str, Any]:
    """The stages in order, and what their reports say; or the first that failed, and why."""
    plan, device = plan_of(args, precision)
    row: dict[str, Any] = {"device": device, "precision": plan.precision, "kernels": plan.kernels}
    common: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": args.model.absolute(), "threads": 2}
    data, folder = args.data.absolute(), {name: work / name for name in ("sft", "dpo", "merge", "evaluate")}
    adapter = folder["dpo"] / "adapter"
    train = {"plan": plan, "dataset": data, **common}
    specs: dict[Stage, Spec] = {
        "sft": TrainSpec(output_dir=folder["sft"], **train),
        "dpo": TrainSpec(output_dir=folder["dpo"], start_adapter=folder["sft"] / "adapter", **train),
        "merge": MergeSpec(output_dir=folder["merge"], adapter=adapter, **train),
        "evaluate": EvaluateSpec(
            output_dir=folder["evaluate"], sft_adapter=folder["sft"] / "adapter", adapter=adapter,
            policy=folder["merge"] / "model", confidence=0.95, generations=4, max_new_tokens=16, min_pairs=1, **train,
        ),
    }  # fmt: skip
    for stage, spec in specs.items():
        spec.output_dir.mkdir()
        (work / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "dpo_assets.training", stage, "--spec", str(work / "spec.json")]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=work)
        if done.returncode:
            said = work / "failure.json"
            why = (
                json.loads(said.read_text(encoding="utf-8"))["message"] if said.is_file() else done.stdout + done.stderr
            )
            return row | {"stage": stage, "error": why[-1500:]}
    reports = {name: json.loads((path / "report.json").read_text(encoding="utf-8")) for name, path in folder.items()}
    row |= {"first_loss": reports["dpo"]["first_loss"], "last_loss": reports["dpo"]["last_loss"]}
    row |= {"scored": reports["evaluate"]["scored"], "why": plan.scoring.reason, "merge": reports["merge"]}
    return row | distances(args.model.absolute(), folder, plan, data)


def plan_of(args: argparse.Namespace, precision: str) -> tuple[TrainingPlan, str]:
    """The planner's plan for this machine's first device, and the device's name."""
    import torch

    from dpo_assets.planning.model_folder import inspect_model
    from dpo_assets.planning.plan import DatasetStats, make_plan
    from dpo_assets.planning.precision import Device
    from dpo_assets.recipe import parse_recipe
    from dpo_assets.training.batches.data import dpo_group, load_split

    sizes = [dpo_group(row, LENGTH).tokens for row in load_split(args.data, "train")]
    stats = DatasetStats(
        train_pairs=len(sizes), eval_pairs=len(load_split(args.data, "eval")), max_length=LENGTH,
        longest_pair=max(sizes), mean_pair=fmean(sizes),
    )  # fmt: skip
    recipe = parse_recipe(
        {
            "base_model": {"source": str(args.model.absolute())},
            "feedback": {"sources": [{"path": "builtin:oasst", "format": "oasst_tree"}], "max_length": LENGTH},
            "sft": SFT,
            "dpo": DPO,
            "hardware": {"precision": precision, "kernels": args.kernels},
        }
    )
    device = Device("cpu", "CPU", 8.0)
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        device = Device("cuda", facts.name, facts.total_memory / 2**30, (facts.major, facts.minor))
    return make_plan(recipe, inspect_model(args.model).shape, stats, device), device.name


def distances(base: Path, folder: dict[str, Path], plan: TrainingPlan, data: Path) -> dict[str, float]:
    """Mean distance, in nats a pair, of margins scored in other ways from those of the release."""
    from dpo_assets.training.batches.data import dpo_group, load_split
    from dpo_assets.training.models.loading import load_base
    from dpo_assets.training.policy import load_policy
    from dpo_assets.training.scoring.logprobs import score_groups

    groups = [dpo_group(row, plan.max_length) for row in load_split(data, "eval")]

    def margins(model: Any) -> list[float]:
        scores, _ = score_groups(model.eval(), groups, plan.token_budget)
        return [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]

    def trained(name: str) -> Any:
        return load_policy(base, plan, folder[name] / "adapter", seed=0, dropout=0.0).model

    merged = folder["merge"] / "model"
    release = margins(load_base(merged, plan.at_release()))
    before, after = margins(trained("sft")), margins(trained("dpo"))
    others = {"adapter on its base": after, "merged, quantised again": margins(load_base(merged, plan))}
    moved = fmean(abs(a - b) for a, b in zip(before, after, strict=True))
    return {"DPO moved": moved} | {
        name: fmean(abs(a - b) for a, b in zip(release, other, strict=True)) for name, other in others.items()
    }


if __name__ == "__main__":
    main()
