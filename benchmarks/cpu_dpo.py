"""The packed trainer beside TRL's own on a CPU: a real 260k-parameter model, real OpenAssistant pairs, one thread.

    python benchmarks/cpu_dpo.py [--repeats 3]

Both train the same pairs in the same order from the same adapter in fp32, so their losses must be equal. TRL 1.15
scores with a Triton kernel that needs a GPU; here a dense stand-in replaces it, which computes whole logits with
PyTorch. TRL runs without gradient checkpointing and at its fastest micro-batch of 2, 4, 8 and 16, found first. Beside
the difference of the losses stands that of TRL against itself at another micro-batch: sums of another order round
differently, and Adam's first steps, near the sign of the gradient, make more of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import polars as pl
import torch
import transformers

from benchmarks.throughput.arithmetic import work_of
from benchmarks.throughput.data import PAIRS_PER_STEP, Row
from benchmarks.throughput.measure import Arm, Block, Measured
from benchmarks.throughput.ours import OursArm
from benchmarks.throughput.peers import TrlArm
from benchmarks.throughput.shapes import LLAMA_TARGETS
from dpo_assets.contract import TokenizeSpec
from dpo_assets.feedback.ingest import read_file
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.screening import screen
from dpo_assets.feedback.sources import files_of
from dpo_assets.feedback.splits import fit_to_model
from dpo_assets.feedback.tables import pairs_frame, quarantine_frame
from dpo_assets.recipe import FeedbackSource
from dpo_assets.training.stages import tokenize

MODEL = Path(str(files("dpo_assets") / "data" / "stories260k"))
MAX_LENGTH = 512
MICRO_BATCHES = (2, 4, 8, 16)
CONTROL = 8
EQUAL_LOSSES = 1e-4


class Silent:
    """A reporter that drops what it is told."""

    def log(self, message: str) -> None:
        pass


def oasst_rows() -> list[Row]:
    """Token ids of the package's OpenAssistant sample, read and screened as the pipeline does it."""
    options = ReadOptions(pairing="best_worst", include_synthetic=False)
    batches = [read_file(f, options) for f in files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])]
    pairs = [pair for batch in batches for pair in batch.pairs]
    rejected = [row for batch in batches for row in batch.rejected]
    screened = screen(pairs_frame(pairs), quarantine_frame(rejected)).pairs
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        screened.write_parquet(out / "pairs.parquet")
        tokenize.run(
            TokenizeSpec(
                output_dir=out, fingerprint="f" * 32, inputs={}, base_model=MODEL,
                pairs=out / "pairs.parquet",
            ),
            Silent(),
        )  # fmt: skip
        accepted, _ = fit_to_model(screened, pl.read_parquet(out / "tokens.parquet"), MAX_LENGTH)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    return [dict(row) for row in accepted.sort("pair_id").select(columns).iter_rows(named=True)]


def best_micro_batch(trl_arm: Arm, rows: list[Row]) -> int:
    """TRL's fastest micro-batch, by one warm-up and two timed steps each."""
    speeds = {}
    for micro in MICRO_BATCHES:
        found = trl_arm.run(rows[: 3 * PAIRS_PER_STEP], Block(1, 2, MAX_LENGTH, micro))
        speeds[micro] = min(found.step_seconds)
        print(f"search: TRL at micro-batch {micro}: {PAIRS_PER_STEP / speeds[micro]:.2f} pairs/s", flush=True)
    return min(speeds, key=lambda micro: speeds[micro])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after one that is not")
    parser.add_argument("--kernels", help="kernels instead of the plan's")
    parser.add_argument("--out", type=Path, help="JSON-lines file that the results are appended to")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = (1 + args.steps) * PAIRS_PER_STEP
    rows = oasst_rows()
    if len(rows) < wanted:
        raise SystemExit(f"{len(rows)} pairs fit in {MAX_LENGTH} tokens; {wanted} are needed: fewer --steps")
    rows = rows[:wanted]
    ours = OursArm(MODEL, "fp32", LLAMA_TARGETS, args.kernels or "auto")
    peer = TrlArm(MODEL, "fp32", LLAMA_TARGETS, checkpointing=False)
    ours.load()
    peer.load()
    micro = best_micro_batch(peer, rows)
    arms: dict[str, tuple[Arm, Block]] = {
        "dpo_assets, packed": (ours, Block(1, args.steps, MAX_LENGTH)),
        f"TRL's DPOTrainer, {micro}x{PAIRS_PER_STEP // micro}, dense stand-in": (
            peer, Block(1, args.steps, MAX_LENGTH, micro)
        ),
    }  # fmt: skip
    found: dict[str, list[Measured]] = {name: [] for name in arms}
    for repeat in range(args.repeats):
        for name, (arm, block) in arms.items():
            found[name].append(arm.run(rows, block))
            print(f"repeat {repeat + 1}: {name}: {found[name][-1].seconds:.2f} s", flush=True)
    control = peer.run(rows, Block(1, args.steps, MAX_LENGTH, CONTROL if micro != CONTROL else CONTROL // 2))
    return report(found, control, rows, args)


def report(found: dict[str, list[Measured]], control: Measured, rows: list[Row], args: argparse.Namespace) -> int:
    """Prints the table; 1 when the losses differ."""
    pairs = args.steps * PAIRS_PER_STEP
    work = work_of(rows[PAIRS_PER_STEP:], MAX_LENGTH)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    print(f"\n{date.today()}, one thread of {platform.machine()}, Python {platform.python_version()}, {packages}")
    print(
        f"stories260K, fp32, {pairs} OpenAssistant pairs, {PAIRS_PER_STEP} a step, max_length {MAX_LENGTH}; "
        f"tokens a pair: {work.unshared_tokens / work.pairs:.0f}, with the prompt shared "
        f"{work.shared_tokens / work.pairs:.0f}. TRL without Triton: dense stand-in for its scoring kernel."
    )
    print("\n| arm | pairs/s, median (min-max) | one epoch incl. reference | ratio | cold ratio | first loss - ln 2 |")
    print("|---|---|---|---|---|---|")
    warm = {name: [pairs / one.seconds for one in runs] for name, runs in found.items()}
    cold = {name: [pairs / (one.seconds + _reference(one, pairs)) for one in runs] for name, runs in found.items()}
    base = list(found)[-1]
    for name, runs in found.items():
        speed, epoch, first = median(warm[name]), median(cold[name]), runs[0].first_loss_minus_ln2
        print(
            f"| {name} | {speed:.2f} ({min(warm[name]):.2f}-{max(warm[name]):.2f}) | {epoch:.2f} | "
            f"{speed / median(warm[base]):.2f} | {epoch / median(cold[base]):.2f} | {first:+.1e} |"
        )
    ours, theirs = (runs[0].losses for runs in found.values())
    largest, noise = _difference(ours, theirs), _difference(control.losses, theirs)
    verdict = "equal" if largest <= EQUAL_LOSSES else "NOT EQUAL"
    print(f"\nlargest difference of a step's loss: {largest:.1e} ({verdict} at {EQUAL_LOSSES:g})")
    print(f"the same of TRL against itself at micro-batch {control.more['micro_batch']}: {noise:.1e}")
    print(f"losses by step: {', '.join(f'{loss:.5f}' for loss in ours)}")
    if args.out:
        _append(args.out, found, warm, cold, largest)
    return 0 if largest <= EQUAL_LOSSES else 1


def _difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _reference(run: Measured, pairs: int) -> float:
    """Seconds of the reference pass over `pairs` pairs; TRL scores its reference within the timed steps."""
    speed = run.more.get("reference_pairs_per_s")
    return pairs / speed if speed else 0.0


def _append(path: Path, found: dict[str, list[Measured]], warm: Any, cold: Any, largest: float) -> None:
    with path.open("a", encoding="utf-8") as out:
        for name, runs in found.items():
            row = {"kind": "cpu", "arm": name, "pairs_per_s": warm[name], "cold_pairs_per_s": cold[name]}
            row |= {"largest_loss_difference": largest, "losses": runs[0].losses, "date": str(date.today())}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
