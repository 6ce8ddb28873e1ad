"""Does every way to train learn what TRL's trainer learns? A real assistant on real human preferences.

    python benchmarks/learning.py prepare --model MODEL_FOLDER --data FOLDER      # anywhere: tokenize and split
    python benchmarks/learning.py run --model MODEL_FOLDER --data FOLDER --out learning.jsonl     # on a GPU
    python benchmarks/learning.py run ... --variants packed,trl --seeds 3
    python benchmarks/learning.py report --out learning.jsonl

MODEL_FOLDER is a Transformers folder with a chat template (`make demo-chat` writes SmolLM2-135M-Instruct). The pairs
are the package's OpenAssistant sample. Each run is stage `dpo` of the worker, in a process of its own, as the pipeline
starts it; then the share of held-out pairs whose implicit reward prefers the chosen answer is measured, with its 95 %
interval. `--jobs` runs share the device, so seconds are no measure of speed. `out-of-memory` runs alone, last, while
this process holds all but FREE_GIB of the device: the stage is then started again as the pipeline would, in forwards of
half the size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EVAL_FRACTION = 0.4
INSTRUCT = {"strategy": "adopt"}
DPO = {"learning_rate": 1e-4, "beta": 0.1, "epochs": 3.0, "batch_size": 8, "schedule": "constant"}
TRL, OOM = {"trainer": "trl"}, "out-of-memory"
# Name: (what it changes of DPO, of hardware). The two with -fp32 and `trl-fp32-micro-4` are for loss curves: TRL at
# another micro-batch is the control that says how far two runs of the same trainer part.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "packed": ({}, {}),
    "trl": (TRL, {"kernels": "transformers"}),
    "packed-fp32": ({}, {"precision": "fp32"}),
    "trl-fp32": (TRL, {"kernels": "transformers", "precision": "fp32"}),
    "trl-fp32-micro-4": (TRL | {"micro_batch_size": 4}, {"kernels": "transformers", "precision": "fp32"}),
    "packed-transformers": ({}, {"kernels": "transformers"}),
    "packed-rows": ({}, {"kernels": "rows"}),
    "packed-unsloth": ({}, {"kernels": "unsloth"}),
    "classic-unsloth-4bit": (TRL, {"kernels": "unsloth", "precision": "4bit"}),
    "classic-unsloth-bf16": (TRL, {"kernels": "unsloth", "precision": "bf16"}),
    **{f"packed-{name}": ({}, {"precision": name}) for name in ("4bit", "8bit", "fp8", "fp16")},
    **{f"reference-{name}": ({"reference_strategy": name}, {}) for name in ("adapter", "merged", "model")},
    **{f"transformers-{name}": ({}, {"speedups": [name]}) for name in ("compile", "liger")},
    OOM: ({}, {}),
}
FREE_GIB, HALVINGS = 3.0, 3
CURVES = ("packed-fp32", "trl-fp32-micro-4")  # Held against trl-fp32.
_scoring = threading.Lock()  # One model at a time in this process.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run", "report"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--jobs", type=int, default=6, help="runs side by side")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a stage is given up")
    args = parser.parse_args()
    if args.what == "report":
        print(report([json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]))
        return
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed")
    if args.what == "prepare":
        prepare(args.model, args.data, args.max_length)
        return
    names = args.variants.split(",")
    wanted = [(name, seed) for seed in range(args.seeds) for name in names if name != OOM]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda one: recorded(one[0], one[1], args), wanted))
    if OOM in names:
        rows.append(recorded(OOM, 0, args))
    print(report(rows))


def recorded(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run, appended to the output file as soon as it is done. Whatever fails in it, the others go on."""
    try:
        row = run(variant, seed, args)
    except Exception as error:
        row = {"variant": variant, "seed": seed, "error": f"{type(error).__name__}: {error}"[-1500:]}
    with _scoring, args.out.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "losses"})[:700], flush=True)
    return row


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a run, and how far the fp32 curves lie from TRL's."""
    lines = [
        "| variant | seed | first loss | last loss | held-out accuracy | margin, nats | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"| {row['variant']} | {row['seed']} |"
        if "error" in row:
            lines.append(f"{name} {' '.join(row['error'].split())[-200:]} | | | | |")
            continue
        score = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] (n={row['n']})"
        lines.append(
            f"{name} {row['first_loss']:.6f} | {row['last_loss']:.4f} | {score} | {row['margin_nats']:.3f} "
            f"| {row['steps']} |"
        )
    curves = {(row["variant"], row["seed"]): row["losses"] for row in rows if "losses" in row}
    for (name, seed), losses in curves.items():
        if name in CURVES and ("trl-fp32", seed) in curves:
            apart = [abs(a - b) for a, b in zip(losses, curves["trl-fp32", seed], strict=True)]
            lines.append(
                f"\n{name}, seed {seed}: largest difference of a loss from trl-fp32 {max(apart):.2g} over {len(apart)} "
                f"steps, {max(apart[:30]):.2g} over the first 30"
            )
    return "\n".join(lines)


def prepare(model: Path, data: Path, max_length: int) -> None:
    """Writes train.parquet and eval.parquet, read, screened, tokenized and split as the pipeline does it."""
    import polars as pl

    from dpo_assets.contract import TokenizeSpec
    from dpo_assets.feedback.ingest import read_file
    from dpo_assets.feedback.readers import ReadOptions
    from dpo_assets.feedback.screening import screen
    from dpo_assets.feedback.sources import files_of
    from dpo_assets.feedback.splits import fit_to_model, split
    from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
    from dpo_assets.recipe import FeedbackSource
    from dpo_assets.training.stages import tokenize

    options = ReadOptions(pairing="best_worst", include_synthetic=False)
    sources = [FeedbackSource(path="builtin:oasst", format="oasst_tree")]
    batches = [read_file(file, options) for file in files_of(sources)]
    pairs = pairs_frame([pair for batch in batches for pair in batch.pairs])
    screened = screen(pairs, quarantine_frame([row for batch in batches for row in batch.rejected])).pairs
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        screened.write_parquet(out / "pairs.parquet")
        common: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": model}
        spec = TokenizeSpec(output_dir=out, pairs=out / "pairs.parquet", **common)
        tokenize.run(spec, Terminal())
        accepted, _ = fit_to_model(screened, pl.read_parquet(out / "tokens.parquet"), max_length)
    for name, part in zip(("train", "eval"), split(accepted, EVAL_FRACTION, 0), strict=True):
        part.write_parquet(data / f"{name}.parquet")
        print(f"{name}: {part.height} pairs")


class Terminal:
    """A reporter that prints."""

    def log(self, message: str) -> None:
        print(message)


def run(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of stage `dpo`, and its held-out scores."""
    from dpo_assets.contract import TrainSpec

    plan = plan_of(variant, seed, args)
    work = Path(tempfile.mkdtemp(prefix="learning-"))
    values: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": args.model.absolute()}
    spec = TrainSpec(output_dir=work / "adapter", plan=plan, dataset=args.data.absolute(), threads=2, **values)
    row: dict[str, Any] = {"variant": variant, "seed": seed, "pairs": plan.train_pairs}
    begun = time.perf_counter()
    held = fill_device() if variant == OOM else None
    spec, error = stage(spec, work, args.timeout)
    del held
    row |= {"seconds": time.perf_counter() - begun} | spec.memory_record()
    if error:
        return row | {"error": error}
    found = json.loads((spec.output_dir / "report.json").read_text(encoding="utf-8"))
    metrics = (spec.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row |= {"precision": plan.precision, "losses": [json.loads(line)["loss"] for line in metrics]}
    row |= {key: found[key] for key in ("steps", "kernels", "first_loss", "last_loss", "nll_ratio")}
    with _scoring:
        return row | held_out(args.model, spec.output_dir / "adapter", plan, args.data)


def stage(spec: Any, work: Path, timeout: float) -> tuple[Any, str]:
    """Runs stage `dpo` to its end and says what went wrong, if anything.

    Out of memory, it starts again in smaller forwards, as `Step.launch` of the pipeline does.
    """
    environment = os.environ | {
        "UNSLOTH_COMPILE_LOCATION": str(work / "unsloth_compiled"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    while True:
        spec.output_dir.mkdir()
        (work / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "dpo_assets.training", "dpo", "--spec", str(work / "spec.json")]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=environment, cwd=work
        )
        if not done.returncode:
            return spec, ""
        failure = work / "failure.json"
        said = json.loads(failure.read_text(encoding="utf-8")) if failure.is_file() else {}
        smaller = spec.smaller_forwards() if said.get("kind") == "memory" else None
        if smaller is None or smaller.out_of_memory_retries > HALVINGS:
            return spec, said.get("message") or (done.stdout + done.stderr)[-1500:]
        print(f"out of memory in forwards of {spec.plan.token_budget} tokens: {said['message'][:160]}", flush=True)
        for path in (failure, work / "spec.json"):
            path.unlink()
        spec = smaller.model_copy(update={"output_dir": work / f"adapter-{smaller.out_of_memory_retries}"})


def fill_device() -> Any:
    """A tensor that leaves FREE_GIB of the device to others."""
    import torch

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(int(free - FREE_GIB * 2**30), dtype=torch.uint8, device="cuda")


def plan_of(variant: str, seed: int, args: argparse.Namespace) -> Any:
    """The planner's plan for this device and these pairs."""
    import torch

    from dpo_assets.planning.model_folder import inspect_model
    from dpo_assets.planning.plan import DatasetStats, make_plan
    from dpo_assets.planning.precision import Device
    from dpo_assets.recipe import parse_recipe
    from dpo_assets.training.batches.data import dpo_group, load_split

    with _scoring:  # `datasets` caches on disk, and its threads get in each other's way.
        groups = [dpo_group(row, args.max_length) for row in load_split(args.data, "train")]
        eval_pairs = len(load_split(args.data, "eval"))
    sizes = [group.tokens for group in groups]
    stats = DatasetStats(
        train_pairs=len(groups), eval_pairs=eval_pairs, max_length=args.max_length,
        longest_pair=max(sizes), mean_pair=sum(sizes) / len(sizes),
    )  # fmt: skip
    dpo, hardware = VARIANTS[variant]
    recipe = parse_recipe(
        {
            "base_model": {"source": str(args.model.absolute())},
            "feedback": {"sources": [{"path": "builtin:oasst", "format": "oasst_tree"}], "max_length": args.max_length},
            "sft": INSTRUCT,
            "dpo": {**DPO, "seed": seed, **dpo},
            "hardware": hardware,
        }
    )
    device = Device("cpu", "CPU", 8.0)
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        device = Device("cuda", facts.name, facts.total_memory / 2**30, (facts.major, facts.minor))
    return make_plan(recipe, inspect_model(args.model).shape, stats, device)


def held_out(folder: Path, adapter: Path, plan: Any, data: Path) -> dict[str, Any]:
    """Implicit-reward accuracy on the eval split; both trainers' adapters are scored by the same forward in fp32."""
    from dpo_assets.checks.evidence.clusters import tie_aware_accuracy
    from dpo_assets.training.batches.data import dpo_group, load_split
    from dpo_assets.training.policy import load_policy
    from dpo_assets.training.scoring.logprobs import score_groups

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
