"""Does the collapse guard stop what would ruin a model, and nothing else? A fault-injection grid on a real small model.

    python -m benchmarks.collapse.grid run --work FOLDER --out grid.jsonl    # 240 runs, resumable
    python -m benchmarks.collapse.grid run ... --set seeds                   # five seeds of the good configuration
    python -m benchmarks.collapse.grid run ... --set between                 # rates that the grid leaves out
    python -m benchmarks.collapse.grid run ... --set stopped                 # a few runs that the guard does stop
    python -m benchmarks.collapse.grid measure --work ... --out grid.jsonl   # datasets, and states that a stop keeps
    python -m benchmarks.collapse.grid score --out grid.jsonl                # the tables, without running again

Learning rate x{0.1, 1, 10, 100, 1000} of a good one, beta {0.01, 0.1, 0.5}, eight kinds of data (`faults`), two seeds.
The model knows facts that DPO is not asked to change (`world`); what became of a run is judged by its answers alone
(`labels`), and only then held against the checks (`scoring`). FOLDER keeps the model, the datasets and the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from benchmarks.collapse import grid_faults as faults
from benchmarks.collapse import grid_figures as figures
from benchmarks.collapse import grid_labels as labels
from benchmarks.collapse import grid_report as report
from benchmarks.collapse import grid_runs as runs
from benchmarks.collapse import grid_scoring as scoring
from benchmarks.collapse import world

CONTROL_SEEDS = tuple(range(2, 7))
BETWEEN = (2.0, 3.0, 5.0)
STOPPED = (faults.CLEAN, faults.NEAR, faults.ALL_FLIPPED)
SFT_DRAWS = 8
SAMPLED_AT_ONCE = 32  # Answers of one batch: the model is so small that a token costs the same for 8 and for 32.


def cells(which: str) -> list[runs.Cell]:
    """The runs of a set.

    `grid`; `seeds`: the good configuration five times; `between`: sound data at rates that the grid leaves out;
    `stopped`: a few runs of the grid that the guard does stop, beside what was computed from the recorded ones.
    """
    if which == "seeds":
        return [runs.Cell(1.0, 0.1, faults.CLEAN, seed) for seed in CONTROL_SEEDS]
    if which == "between":
        return [runs.Cell(x, 0.1, fault, seed) for seed in runs.SEEDS for fault in labels.SOUND for x in BETWEEN]
    if which == "stopped":
        return [runs.Cell(10.0, 0.1, fault, seed) for seed in runs.SEEDS for fault in STOPPED]
    return runs.grid()


def quiet() -> None:
    """One thread, no progress bars, answers in batches that suit a tiny model."""
    import datasets
    import torch
    import transformers

    from dpo_assets.training.scoring import generation

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    generation.GENERATION_BATCH = SAMPLED_AT_ONCE


def run_all(work: Path, out: Path, which: str, part: str) -> None:
    """Runs what `out` lacks, a line a run. `part` i/n takes every n-th cell, for several processes."""
    wanted = cells(which)
    runs.prepare(work, sorted({(cell.fault, cell.seed) for cell in wanted}))
    done = {row["name"] for row in read(out)}
    first, step = (int(n) for n in part.split("/"))
    if "sft" not in done and first == 0 and which == "grid":
        append(out, {"name": "sft", "behaviour": sft_behaviour(work)})
    for n, cell in enumerate(wanted):
        name = f"stopped:{cell.name}" if which == "stopped" else cell.name
        if n % step != first or name in done:
            continue
        row = {"name": name, "set": which} | runs.run(work, cell, stops=which == "stopped")
        append(out, row)
        said = {k: round(v, 3) for k, v in row.get("behaviour", {}).items() if k != "answers"}
        took = f"{row.get('seconds', 0):.1f} s"
        print(f"{n + 1}/{len(wanted)} {name} {row.get('stopped_by', '')} {said} {took}", flush=True)


def measure(work: Path, out: Path) -> None:
    """What scoring needs beside the runs: reports of the datasets, tasks before DPO, states that a stop keeps."""
    from transformers import AutoTokenizer

    rows = read(out)
    done = {row["name"] for row in rows}
    if "sft-tasks" not in done:
        tokenizer = AutoTokenizer.from_pretrained(work / "world")
        append(out, {"name": "sft-tasks", "tasks": runs.tasks_met(runs.policy_of(work, None), tokenizer)})
    for fault, seed in sorted({(row["fault"], row["seed"]) for row in rows if "fault" in row}):
        if f"data:{fault}-{seed}" not in done:
            with tempfile.TemporaryDirectory() as folder:
                faults.write_dataset(fault, seed, work / "world", Path(folder) / "data")
                report = json.loads((Path(folder) / "data" / "report.json").read_text(encoding="utf-8"))
            append(out, {"name": f"data:{fault}-{seed}", "report": report})
    for sign in scoring.TRIED["kl_per_token_sign"]:
        bands = scoring.with_numbers({"kl_per_token_sign": sign})
        for one in scoring.score(rows := read(out), bands):
            name = f"kept:{one.row['name']}@{one.kept_step}"
            if one.trigger is None or one.label == "must_be_caught" or any(row["name"] == name for row in rows):
                continue
            cell = runs.Cell(one.row["times"], one.row["beta"], one.fault, one.row["seed"])
            # The start is the same for every run of a seed.
            start = [row for row in rows if row.get("kept_step") == 0 and row["seed"] == cell.seed]
            known = start[0]["behaviour"] if start and not one.kept_step else None
            found = known or runs.state_behaviour(work, cell, one.kept_step)
            row = {"name": name, "kept_step": one.kept_step, "seed": cell.seed, "behaviour": found}
            append(out, row)
            rows.append(row)
            print(name, f"facts {found['facts']:.3f}", flush=True)


def sft_behaviour(work: Path) -> dict[str, float]:
    """The model's behaviour before DPO, over several draws of the probe."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(work / "world"), runs.policy_of(work, None)
    found = [world.measure(model, tokenizer, seed).as_dict() for seed in range(SFT_DRAWS)]
    means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    return means | {"answers": sum(one["answers"] for one in found)}


def append(out: Path, row: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none where there is no file yet."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["run", "measure", "score"])
    parser.add_argument("--work", type=Path, default=Path("collapse-grid"), help="folder of model, datasets and runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/collapse_grid.jsonl"))
    parser.add_argument("--set", choices=["grid", "seeds", "between", "stopped"], default="grid")
    parser.add_argument("--figures", type=Path, help="folder for the figures of `score`")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run, from the i-th on")


def run(args: argparse.Namespace) -> int:
    """Runs, measures or scores, as the arguments say; the exit status."""
    if args.what == "score":
        rows = read(args.out)
        print(report.report(rows))
        if args.figures:
            figures.draw(scoring.score(rows), args.figures)
        return 0
    quiet()
    if args.what == "run":
        run_all(args.work, args.out, args.set, args.part)
    else:
        measure(args.work, args.out)
    return 0


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(arguments)
    raise SystemExit(run(arguments.parse_args()))
