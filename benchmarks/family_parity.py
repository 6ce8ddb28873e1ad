"""Does each engine compute the gradient that TRL computes? The first step of every family, with heads of real size.

    python benchmarks/family_parity.py --out parity.jsonl                       # on a GPU: bf16, small shapes
    python benchmarks/family_parity.py --models tiny-qwen3-8b --out cpu.jsonl   # on a CPU: fp32
    python benchmarks/family_parity.py --report parity.jsonl

All train the same 16 pairs from the same adapter (rank 16, B zero) in one process. On a GPU, TRL in fp32 is what all
are held against, and TRL in bf16 at another micro-batch is the control that says how far rounding alone leads. Layers
are few and narrow; heads, windows and rotations are those of the published models, so that the same kernels run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput import data
from benchmarks.throughput.cases import PARITY_COSINE, PARITY_NORM
from benchmarks.throughput.compare import gradient_distance
from benchmarks.throughput.shapes import SHAPES, SMALL, TINY, is_tiny

ROWS_SCALE = 0.5
MODELS = [name for name in SHAPES if name.startswith(SMALL)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kernels", default="fused,transformers,rows", help="engines of ours")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "family_parity.jsonl")
    parser.add_argument("--deadline", type=float, default=500.0, help="seconds after which no model is begun")
    parser.add_argument("--report", type=Path, help="print the table of these results and end")
    args = parser.parse_args()
    if args.report:
        print(report([json.loads(line) for line in args.report.read_text(encoding="utf-8").splitlines()]))
        return 0
    warnings.filterwarnings("ignore")
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    for name in args.models.split(","):
        if time.monotonic() - begun > args.deadline:
            print(f"deadline: {name} and what follows is left out", flush=True)
            break
        for row in distances(name, args.kernels.split(",")):
            rows.append(row)
            with args.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(f"[{time.monotonic() - begun:5.1f} s] {json.dumps(row)}", flush=True)
    print(report(rows))
    return 0 if all(holds(row) for row in rows if row["arm"].startswith("ours")) else 1


def distances(name: str, kernels: list[str]) -> Any:
    """One row an arm: how far its first gradient lies from TRL's."""
    from benchmarks.throughput.measure import CUDA
    from benchmarks.throughput.models import build

    folder = Path(tempfile.mkdtemp(prefix=f"family-parity-{name}-"))
    half, length = ("bf16", 512) if CUDA else ("fp32", 128)
    arms = [("trl", half, 8), ("trl", half, 4), *((f"ours_{engine}", half, None) for engine in kernels)]
    if CUDA:
        arms = [("trl", "fp32", 4), *arms]
    try:
        build(name, folder)
        corpus = data.read_corpus(folder)
        scale = 0.1 if is_tiny(name) or not CUDA else ROWS_SCALE
        rows = data.block(partial(_rows, corpus, scale), 0, 1)
        known: dict[str, Path] = {}
        for number, (who, precision, micro) in enumerate(arms):
            arm = f"{who}-{precision}" + (f" at micro-batch {micro}" if micro else "")
            gradient = folder / f"{number}.safetensors"
            row: dict[str, Any] = {"model": name, "arm": arm} | first_step(
                folder, name, who, precision, micro, length, rows, gradient
            )
            row |= {against: gradient_distance(path, gradient) for against, path in known.items() if gradient.exists()}
            if who == "trl" and precision not in known and "error" not in row:
                known[precision] = gradient
            yield row
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rows(corpus: list[int], scale: float, count: int, seed: int) -> list[data.Row]:
    return data.like_ultrafeedback(corpus, count, seed, scale)


def first_step(
    folder: Path, name: str, who: str, precision: str, micro: int | None, length: int, rows: list[data.Row], to: Path
) -> dict[str, Any]:
    """Trains one step and writes its gradient; what the first loss was and who computed, or why not."""
    from benchmarks.throughput.measure import Arm, Block, free_memory
    from benchmarks.throughput.ours import OursArm
    from benchmarks.throughput.peers import TrlArm

    begun, targets = time.monotonic(), SHAPES[name].targets
    arm: Arm
    if who == "trl":
        arm = TrlArm(folder, precision, targets, checkpointing=True)
    else:
        arm = OursArm(folder, precision, targets, who.partition("_")[2])
    try:
        arm.load()
        found = arm.run(rows, Block(0, 1, length, micro, max_grad_norm=1e9, gradient=to))
    except Exception as error:  # Whatever fails in a library: the other arms go on.
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        del arm
        free_memory()
    kernels = {key: found.more[key] for key in ("kernels", "kernels_note") if found.more.get(key)}
    seconds = round(time.monotonic() - begun, 1)
    return {"first_loss_minus_ln2": found.first_loss_minus_ln2, "seconds": seconds} | kernels


def holds(row: dict[str, Any]) -> bool:
    """Whether an arm's gradient is TRL's in the same precision."""
    against = row.get("bf16") or row.get("fp32")
    if "error" in row or against is None or "cosine" not in against:
        return False
    return bool(against["cosine"] >= PARITY_COSINE and abs(against["norm_ratio"] - 1) <= PARITY_NORM)


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown: cosine and norm ratio of each first gradient."""
    lines = [
        "| family | arm | computed by | against TRL's fp32: cosine, norm | against TRL's in bf16 | lowest matrix | "
        "first loss - ln 2 | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['model'].removeprefix(f'{SMALL}-').removeprefix(f'{TINY}-')} | {row['arm']} |"
        if "error" in row:
            lines.append(f"{head} | | | | | {row['error'][:160]} |")
            continue
        same = row.get("bf16") or row.get("fp32") or {}
        verdict = "" if row["arm"].startswith("trl") else "within" if holds(row) else "OUTSIDE"
        lowest = f"{same['lowest_matrix_cosine']:.5f}" if "lowest_matrix_cosine" in same else "-"
        cells = [row.get("kernels", "-"), _shown(row.get("fp32")), _shown(row.get("bf16")), lowest]
        lines.append(f"{head} {' | '.join(cells)} | {row['first_loss_minus_ln2']:+.1e} | {verdict} |")
    return "\n".join(lines)


def _shown(distance: dict[str, Any] | None) -> str:
    if not distance:
        return "-"
    return (
        str(distance.get("error")) if "error" in distance else f"{distance['cosine']:.6f}, {distance['norm_ratio']:.5f}"
    )


if __name__ == "__main__":
    sys.exit(main())
