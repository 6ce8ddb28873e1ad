"""Does the packed trainer learn what TRL's learns? A real assistant on real human preferences, several seeds each.

    python benchmarks/learning.py prepare --model MODEL_FOLDER --data FOLDER      # anywhere: tokenize and split
    python benchmarks/learning.py run --model MODEL_FOLDER --data FOLDER --out learning.jsonl     # on a GPU

MODEL_FOLDER is a Transformers folder with a chat template (`make demo-chat` writes SmolLM2-135M-Instruct). The pairs
are the package's OpenAssistant sample. Each run is stage `dpo` of the worker, as the pipeline starts it, once with
`trainer: packed` and once with `trainer: trl`; then the share of held-out pairs whose implicit reward prefers the
chosen answer is measured, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EVAL_FRACTION = 0.4
INSTRUCT = {"strategy": "adopt"}
DPO = {"learning_rate": 1e-4, "beta": 0.1, "epochs": 3.0, "batch_size": 8, "schedule": "constant"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--trainers", default="packed,trl")
    args = parser.parse_args()
    if args.what == "prepare":
        prepare(args.model, args.data, args.max_length)
        return
    for seed in range(args.seeds):
        for trainer in args.trainers.split(","):
            row = run(trainer, seed, args)
            with args.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps(row)[:600], flush=True)


def prepare(model: Path, data: Path, max_length: int) -> None:
    """Writes train.parquet and eval.parquet, read, screened, tokenized and split as the pipeline does it."""
    import polars as pl

    from dpo_assets.contract import TokenizeSpec
    from dpo_assets.feedback.cleaning import fit_to_model, screen, split
    from dpo_assets.feedback.ingest import find_files, pairs_frame, quarantine_frame, read_file
    from dpo_assets.feedback.readers import ReadOptions
    from dpo_assets.recipe import FeedbackSource
    from dpo_assets.training import tokenize

    options = ReadOptions(pairing="best_worst", include_synthetic=False)
    sources = [FeedbackSource(path="builtin:oasst", format="oasst_tree")]
    batches = [read_file(file, options) for file in find_files(sources)]
    pairs = pairs_frame([pair for batch in batches for pair in batch.pairs])
    screened = screen(pairs, quarantine_frame([row for batch in batches for row in batch.rejected])).pairs
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        screened.write_parquet(out / "pairs.parquet")
        common: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": model}
        spec = TokenizeSpec(output_dir=out, pairs=out / "pairs.parquet", max_length=max_length, **common)
        tokenize.run(spec, Terminal())
        accepted, _ = fit_to_model(screened, pl.read_parquet(out / "tokens.parquet"), max_length)
    for name, part in zip(("train", "eval"), split(accepted, EVAL_FRACTION, 0), strict=True):
        part.write_parquet(data / f"{name}.parquet")
        print(f"{name}: {part.height} pairs")


class Terminal:
    """A reporter that prints."""

    def log(self, message: str) -> None:
        print(message)


def run(trainer: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of stage `dpo`, and its held-out scores."""
    from dpo_assets.contract import TrainSpec

    plan = plan_of(trainer, seed, args)
    work = Path(tempfile.mkdtemp(prefix="learning-"))
    out = work / "adapter"
    out.mkdir()
    values: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": args.model, "dataset": args.data}
    spec = TrainSpec(output_dir=out, plan=plan, **values)
    (work / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    begun = time.perf_counter()
    command = [sys.executable, "-m", "dpo_assets.training", "dpo", "--spec", str(work / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"trainer": trainer, "seed": seed, "pairs": plan.train_pairs, "steps": plan.dpo_steps}
    if done.returncode:
        return row | {"error": (done.stdout + done.stderr)[-800:]}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    row |= {"seconds": time.perf_counter() - begun, "kernels": report["kernels"], "precision": plan.precision}
    row |= {"first_loss": report["first_loss"], "last_loss": report["last_loss"], "nll_ratio": report["nll_ratio"]}
    return row | held_out(args.model, out / "adapter", plan, args.data)


def plan_of(trainer: str, seed: int, args: argparse.Namespace) -> Any:
    """The planner's plan for this device and these pairs."""
    import torch

    from dpo_assets.planning.model_folder import inspect_model
    from dpo_assets.planning.plan import DatasetStats, make_plan
    from dpo_assets.planning.precision import Device
    from dpo_assets.recipe import parse_recipe
    from dpo_assets.training.data import dpo_group, load_split

    groups = [dpo_group(row, args.max_length) for row in load_split(args.data, "train")]
    sizes = [group.tokens for group in groups]
    stats = DatasetStats(
        train_pairs=len(groups), eval_pairs=len(load_split(args.data, "eval")), max_length=args.max_length,
        longest_pair=max(sizes), mean_pair=sum(sizes) / len(sizes),
    )  # fmt: skip
    recipe = parse_recipe(
        {
            "base_model": {"source": str(args.model.absolute())},
            "feedback": {"sources": [{"path": "builtin:oasst", "format": "oasst_tree"}], "max_length": args.max_length},
            "sft": INSTRUCT,
            "dpo": {**DPO, "seed": seed, "trainer": trainer},
            "hardware": {"kernels": "auto" if trainer == "packed" else "transformers"},
        }
    )
    device = Device("cpu", "CPU", 8.0)
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        device = Device("cuda", facts.name, facts.total_memory / 2**30, (facts.major, facts.minor))
    return make_plan(recipe, inspect_model(args.model).shape, stats, device)


def held_out(folder: Path, adapter: Path, plan: Any, data: Path) -> dict[str, Any]:
    """Implicit-reward accuracy on the eval split; both trainers' adapters are scored by the same forward in fp32."""
    from dpo_assets.checks.statistics import tie_aware_accuracy
    from dpo_assets.training.data import dpo_group, load_split
    from dpo_assets.training.logprobs import score_groups
    from dpo_assets.training.policy import load_policy

    exact = plan.model_copy(update={"precision": "fp32", "kernels": "transformers"})
    groups = [dpo_group(row, plan.max_length) for row in load_split(data, "eval")]
    model = load_policy(folder, exact, adapter, seed=0, dropout=0.0).model.eval()
    after, _ = score_groups(model, groups, plan.token_budget)
    with model.disable_adapter():
        before, _ = score_groups(model, groups, plan.token_budget)
    shift = [a - b for a, b in zip(after, before, strict=True)]
    margins = [chosen - rejected for chosen, rejected in zip(shift[::2], shift[1::2], strict=True)]
    found = tie_aware_accuracy(margins)
    return {"held_out": len(groups), "margin_nats": sum(margins) / len(margins), **found.as_dict()}


if __name__ == "__main__":
    main()
