"""Throughput and memory of LoRA DPO on one device: the packed trainer beside TRL's own and Unsloth's.

    python benchmarks/dpo_throughput.py --model 8b --deadline 460 --out 8b.jsonl
    python benchmarks/dpo_throughput.py --model 1b --parity --out 1b.jsonl
    python benchmarks/dpo_throughput.py --model 1b --precisions fp8,8bit,fp16,4bit,bf16 --cases none --out p.jsonl
    python benchmarks/dpo_throughput.py --report 8b.jsonl 1b.jsonl
    python benchmarks/dpo_throughput.py --model tiny --repeats 1 --parity      # on a CPU: does everything run?

All arms load the same random weights of a Llama shape, start from the same adapter (rank 16 on all linear layers, B
zero) and train the same pairs in the same order: 16 pairs an optimizer step, lengths like UltraFeedback's, max_length
1024, learning rate 2e-4 without warm-up, beta 0.1. Each arm is a process of its own; all load side by side and are then
timed one at a time, in turn, over the same pairs. Caps bound PyTorch's allocator, for every arm alike. Peers train at
their best micro-batch of 2, 4, 8 and 16 under the cap; ours follows the plan that the planner makes for the cap. Every
result is appended to the output file at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput.cases import CASES, OURS, Case
from benchmarks.throughput.compare import (
    LOAD_TIMEOUT,
    Settings,
    read_results,
    run_case,
    run_parity,
    run_precisions,
    start_arms,
    sweep_plans,
)
from benchmarks.throughput.coordinator import Record, Session
from benchmarks.throughput.report import markdown


def main() -> int:
    args = _arguments()
    if args.report:
        print(markdown(read_results(args.report)))
        return 0
    begun = time.monotonic()
    record = Record(args.out, {"model": args.model, "run": f"{time.time():.0f}"})
    names = _case_names(args)
    if args.arms:
        for name in names:
            CASES[name] = replace(CASES[name], arms=tuple(arm for arm in CASES[name].arms if arm.startswith(args.arms)))
    with Session(args.model, record, args.deadline, args.block_timeout, args.logs) as session:
        _run(session, names, args, _settings(args))
    record.say(f"done after {time.monotonic() - begun:.0f} s; results in {args.out}, logs of the arms in {args.logs}")
    print(markdown([row for row in read_results([args.out]) if row["run"] == record.common["run"]]))
    return 0


def _run(session: Session, names: list[str], args: argparse.Namespace, settings: Settings) -> None:
    cases = {name: CASES[name] for name in names}
    precisions = [f"{OURS}-{name}" for name in args.precisions]
    plain = "fp32" if args.model == "tiny" else "bf16"
    parity = (f"{OURS}-{plain}", f"trl-{plain}")
    exact = "trl-fp32" if args.parity and plain != "fp32" else None
    more = [*(parity if args.parity else ()), *([exact] if exact else ()), *precisions]
    start_arms(session, cases.values(), settings, more)
    waiting = list(session.workers)

    def wait_for(arms: list[str]) -> None:
        for arm in arms:
            waiting.remove(arm)
            session.loaded(arm, args.load_timeout)

    if args.parity:
        wait_for([arm for arm in (*parity, exact) if arm in waiting])
        session.record.write("device", date=str(date.today()), **session.device())
        run_parity(session, *parity, exact, settings)  # Nothing is timed here, so the others may still load.
    wait_for(list(waiting))
    if not args.parity:
        session.record.write("device", date=str(date.today()), **session.device())
    for name in names:
        session.keep_only(_needed(cases, names[names.index(name) :], precisions))
        run_case(session, name, settings)
        if CASES[name].cap_gib is not None:
            sweep_plans(session, name, settings)
    session.keep_only(set(precisions))
    run_precisions(session, args.precisions, settings)


def _needed(cases: dict[str, Case], names: list[str], more: list[str]) -> set[str]:
    """Arms that the cases `names` still need."""
    return {arm for name in names for arm in cases[name].arms} | set(more)


def _case_names(args: argparse.Namespace) -> list[str]:
    if args.cases == ["none"]:
        return []
    known = [name for name, case in CASES.items() if case.model == args.model]
    if unknown := [name for name in args.cases if name not in known]:
        raise SystemExit(f"no case {unknown} for model {args.model}; there are {known}")
    # In the order of CASES, whatever order was asked for: cases without a cap come last.
    return [name for name in known if not args.cases or name in args.cases]


def _settings(args: argparse.Namespace) -> Settings:
    overrides: dict[str, Any] = {}
    if args.budget is not None:
        overrides["token_budget"] = args.budget
    if args.recompute is not None:
        overrides |= {"recomputed_layers": args.recompute, "gradient_checkpointing": args.recompute > 0}
    if args.kernels is not None:
        overrides["kernels"] = args.kernels
    return Settings(
        repeats=args.repeats,
        ours_warmup=args.ours_warmup,
        ours_steps=args.ours_steps,
        peer_warmup=args.peer_warmup,
        peer_steps=args.peer_steps,
        search=args.search,
        search_warmup=args.search_warmup,
        search_steps=args.search_steps,
        micro_batches={arm: int(size) for arm, _, size in (text.partition("=") for text in args.micro_batch)},
        overrides=overrides,
        parity_steps=args.parity_steps,
        exact_steps=args.exact_steps,
        sweep=tuple((int(budget), int(layers)) for budget, _, layers in (text.partition(":") for text in args.sweep)),
        precision_steps=args.precision_steps,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=["tiny", "1b", "8b"], default="tiny")
    add("--cases", type=_names, default=[], help=f"of {', '.join(CASES)}; `none`; default: all of the model")
    add(
        "--arms", type=lambda text: tuple(_names(text)), help="only arms that start so, e.g. ours; the rest is left out"
    )
    add("--parity", action="store_true", help="first: gradient and losses of ours against TRL, beside TRL against TRL")
    add("--parity-steps", type=int, default=30)
    add("--exact-steps", type=int, default=8, help="of parity: steps of TRL in fp32, which both are held against")
    add("--sweep", nargs="*", default=[], metavar="TOKENS:LAYERS", help="other plans of ours to try in capped cases")
    add("--precisions", type=_names, default=[], help="last: ours in these precisions, e.g. fp8,8bit,fp16,4bit,bf16")
    add("--precision-steps", type=int, default=20)
    add("--repeats", type=int, default=3)
    add("--ours-warmup", type=int, default=2)
    add("--ours-steps", type=int, default=6, help="a multiple of 3 times the same pairs as the peers'")
    add("--peer-warmup", type=int, default=1)
    add("--peer-steps", type=int, default=3)
    add("--search", choices=["climb", "all"], default="climb", help="of a peer's micro-batch: from 8 outwards, or all")
    add("--search-warmup", type=int, default=1)
    add("--search-steps", type=int, default=2)
    add("--micro-batch", nargs="*", default=[], metavar="ARM=N", help="known best micro-batches, not searched for")
    add("--budget", type=int, help="token budget instead of the plan's")
    add("--recompute", type=int, help="recomputed layers instead of the plan's")
    add("--kernels", help="kernels instead of the plan's: fused, transformers")
    add("--deadline", type=float, help="seconds after which no new block is started")
    add("--block-timeout", type=float, default=240.0, help="seconds after which a block's arm is given up")
    add("--load-timeout", type=float, default=LOAD_TIMEOUT)
    add("--out", type=Path, default=Path(tempfile.gettempdir()) / "dpo_throughput.jsonl")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "dpo-throughput-logs")
    add("--report", type=Path, nargs="+", help="print the tables of these result files and end")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
