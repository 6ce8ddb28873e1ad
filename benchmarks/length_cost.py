"""What long prompts and long rows cost: pairs/s of the packed trainer by prompt : completion ratio and max_length.

    python benchmarks/length_cost.py --model 1b --out lengths.jsonl --plot lengths.svg
    python benchmarks/length_cost.py --model gemma3-4b --ratios 1 --max-lengths 1024,2048,4096,8192,16384 --cap 24
    python benchmarks/length_cost.py --plot lengths.png --from lengths.jsonl
    python benchmarks/length_cost.py --model tiny --max-lengths 64,128     # on a CPU: does everything run?

All rows have 0.95 to 1 times max_length tokens; 16 pairs an optimizer step, LoRA rank 16, random weights. The prompt is
computed once for both answers, so the higher the ratio, the fewer tokens a pair costs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput.cases import OURS
from benchmarks.throughput.compare import LOAD_TIMEOUT, Settings, read_results
from benchmarks.throughput.coordinator import Record, Session
from benchmarks.throughput.gate import Gate, device_gib
from benchmarks.throughput.report import markdown
from benchmarks.throughput.shapes import SHAPES, is_tiny


def main() -> int:
    args = _arguments()
    if args.source is None:
        measure(args)
    rows = read_results([args.source or args.out])
    if args.source is None:
        last = rows[-1]["run"]
        rows = [row for row in rows if row["run"] == last]
    print(markdown(rows))
    if args.plot and find_spec("matplotlib") is None:
        print(f"no matplotlib here; elsewhere: python benchmarks/length_cost.py --from {args.out} --plot {args.plot}")
    elif args.plot:
        plot(rows, args.plot)
    return 0


def measure(args: argparse.Namespace) -> None:
    """Times every ratio at every max_length, shortest rows first."""
    record = Record(args.out, {"model": args.model, "run": f"{time.time():.0f}"})
    arm = f"{args.arm}-{'fp32' if is_tiny(args.model) else args.precision}"
    settings = Settings(ours_warmup=args.warmup, ours_steps=args.steps)
    gate = Gate(device_gib())
    with Session(args.model, record, args.deadline, args.block_timeout, args.logs, gate) as session:
        session.start({arm: ({}, {})}, LOAD_TIMEOUT)
        if not session.loaded(arm, LOAD_TIMEOUT):
            return
        record.write("device", date=str(date.today()), **session.device())
        for max_length in args.max_lengths:
            for ratio in args.ratios:
                if not session.time_left():
                    record.say("deadline")
                    return
                answer = session.train(arm, settings.block(arm, max_length, args.cap), {"ratio": ratio})
                record.write("length", arm=arm, what=f"{max_length} 1:{1 / ratio:.2g}", ratio=ratio,
                             max_length=max_length, cap_gib=args.cap, **answer)  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Pairs/s, and row tokens/s (a prompt counted for each of its answers), over the ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [row for row in rows if row["kind"] == "length" and "error" not in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for max_length in sorted({row["max_length"] for row in found}):
        line = sorted((row for row in found if row["max_length"] == max_length), key=lambda row: row["ratio"])
        ratios = [row["ratio"] for row in line]
        left.plot(ratios, [row["pairs_per_s"] for row in line], marker="o", label=f"max_length {max_length}")
        right.plot(ratios, [row["unshared_tokens_per_s"] / 1e3 for row in line], marker="o")
    for axes, title in ((left, "pairs/s"), (right, "thousand row tokens/s")):
        axes.set(xscale="log", xlabel="prompt tokens per completion token", title=title)
        axes.set_xticks(sorted({row["ratio"] for row in found}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"plot: {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="1b")
    add("--arm", default=OURS, help="ours, or ours_KERNELS")
    add("--precision", default="bf16")
    add("--ratios", type=lambda text: [float(x) for x in text.split(",")], default=[0.3, 1.0, 3.0, 10.0])
    add("--max-lengths", type=lambda text: [int(x) for x in text.split(",")], default=[1_024, 4_096, 8_192])
    add("--warmup", type=int, default=1)
    add("--steps", type=int, default=2)
    add("--cap", type=float, help="GiB that the plan may use; default: the device's memory")
    add("--deadline", type=float, help="seconds after which no new block is started")
    add("--block-timeout", type=float, default=240.0)
    add("--out", type=Path, default=Path(tempfile.gettempdir()) / "length_cost.jsonl")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "dpo-throughput-logs")
    add("--plot", type=Path, help="file of the plot, .png or .svg")
    add("--from", dest="source", type=Path, help="plot and print these results instead of measuring")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
