"""Throughput and memory of LoRA DPO on one device: the packed trainer beside TRL's own and Unsloth's.

    python benchmarks/dpo_throughput.py --model 8b --deadline 460 --out 8b.jsonl
    python benchmarks/dpo_throughput.py --model qwen3-1.7b,gemma3-4b,1b:ours --out small.jsonl    # loaded side by side
    python benchmarks/dpo_throughput.py --model 1b --parity --out 1b.jsonl
    python benchmarks/dpo_throughput.py --model 1b --precisions fp8,8bit,fp16,4bit,bf16 --cases none --out p.jsonl
    python benchmarks/dpo_throughput.py --report 8b.jsonl 1b.jsonl
    python benchmarks/dpo_throughput.py --model tiny-gemma3-4b --repeats 1 --parity    # on a CPU: does it run?

All arms load the same random weights of a published shape, start from the same adapter (rank 16 on all linear layers, B
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
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.throughput.cases import CASES, OURS, Case
from benchmarks.throughput.compare import (
    LOAD_TIMEOUT,
    Settings,
    is_ours,
    read_results,
    run_case,
    run_parity,
    run_precisions,
    start_arms,
    sweep_plans,
)
from benchmarks.throughput.coordinator import Record, Session
from benchmarks.throughput.gate import Gate, device_gib
from benchmarks.throughput.report import markdown
from benchmarks.throughput.shapes import SHAPES, is_tiny


def main() -> int:
    args = _arguments()
    if args.report:
        print(markdown(read_results(args.report)))
        return 0
    begun = time.monotonic()
    record = Record(args.out, {"run": f"{time.time():.0f}"})
    chosen = _chosen(args)
    settings, gate = _settings(args), Gate(args.device_gib or device_gib())
    with ExitStack() as stack:
        models = [
            Model(stack.enter_context(Session(
                model, record.of(model=model), args.deadline, args.block_timeout, args.logs, gate
            )), cases, args)
            for model, cases in chosen.items()
        ]  # fmt: skip
        for model in models:
            model.start(settings)
        for model in models:
            model.parity(settings)
        for model in models:
            model.wait()
        while args.after and not args.after.exists():
            time.sleep(1.0)
        for model in models:
            model.time(settings)
    record.say(f"done after {time.monotonic() - begun:.0f} s; results in {args.out}, logs of the arms in {args.logs}")
    print(markdown([row for row in read_results([args.out]) if row["run"] == record.common["run"]]))
    return 0


class Model:
    """One model's part of a call. All arms of all models load side by side; what is timed has the device to itself."""

    def __init__(self, session: Session, cases: dict[str, Case], args: argparse.Namespace) -> None:
        self.session, self.cases, self.args = session, cases, args
        plain = "fp32" if is_tiny(session.shape) else "bf16"
        ours = dict.fromkeys(arm for case in cases.values() for arm in case.arms if is_ours(arm))
        ours_plain = [arm for arm in ours if arm.endswith(f"-{plain}")] or [f"{OURS}-{plain}"]
        self.peer, self.exact = f"trl-{plain}", "trl-fp32" if args.exact_steps and plain != "fp32" else None
        self.proven = ours_plain if args.parity else []
        self.precisions = [f"{OURS}-{name}" for name in args.precisions]
        self._waiting: list[str] = []

    def start(self, settings: Settings) -> None:
        extra = [*self.proven, self.peer, *([self.exact] if self.exact else [])] if self.proven else []
        start_arms(self.session, self.cases.values(), settings, [*extra, *self.precisions], self.args.load_timeout)
        self._waiting = list(self.session.workers)

    def parity(self, settings: Settings) -> None:
        """Nothing is timed here, so the others may still load. Whoever is not needed afterwards makes room for them."""
        if not self.proven:
            return
        self._wait_for([arm for arm in (self.peer, *self.proven, self.exact) if arm and arm in self._waiting])
        run_parity(self.session, self.proven, self.peer, self.exact, settings)
        self.session.keep_only(self._needed(self.cases) | set(self.precisions))
        self._waiting = [arm for arm in self._waiting if arm in self.session.workers]

    def wait(self) -> None:
        """Until all arms have loaded."""
        self._wait_for(list(self._waiting))
        self.session.record.write("device", date=str(date.today()), **self.session.device())

    def time(self, settings: Settings) -> None:
        names = list(self.cases)
        for name in names:
            self.session.keep_only(self._needed(names[names.index(name) :]) | set(self.precisions))
            run_case(self.session, name, self.cases[name], settings)
            if self.cases[name].cap_gib is not None:
                sweep_plans(self.session, name, self.cases[name], settings)
        self.session.keep_only(set(self.precisions))
        run_precisions(self.session, self.args.precisions, settings)
        self.session.keep_only(())

    def _needed(self, names: Iterable[str]) -> set[str]:
        """Arms that these cases still need."""
        return {arm for name in names for arm in self.cases[name].arms}

    def _wait_for(self, arms: list[str]) -> None:
        for arm in arms:
            self._waiting.remove(arm)
            self.session.loaded(arm, self.args.load_timeout)


def _chosen(args: argparse.Namespace) -> dict[str, dict[str, Case]]:
    """Model -> its cases, in the order of CASES, whatever order was asked for: cases without a cap come last."""
    none = args.cases == ["none"]
    chosen: dict[str, dict[str, Case]] = {}
    for text in args.model:
        model, _, arms = text.partition(":")
        if model not in SHAPES:
            raise SystemExit(f"no model {model}; there are {', '.join(SHAPES)}")
        who = tuple(arms.split("+")) if arms else args.arms
        cases = {name: case for name, case in CASES.items() if case.model == model and not none}
        cases = {name: case for name, case in cases.items() if not args.cases or name in args.cases}
        chosen[model] = {name: replace(case, who=who) if who else case for name, case in cases.items()}
    if unknown := {*args.cases} - {name for cases in chosen.values() for name in cases} - {"none"}:
        raise SystemExit(f"no case {sorted(unknown)} of {', '.join(chosen)}; cases: {', '.join(CASES)}")
    return chosen


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
    add(
        "--model",
        type=_names,
        default=["tiny"],
        help=f"one or several of {', '.join(SHAPES)}; `NAME:ours+unsloth` times these arms of it alone",
    )
    add("--cases", type=_names, default=[], help="names of cases.py; `none`; default: all of the models")
    add(
        "--arms",
        type=lambda text: tuple(_names(text)),
        help="instead of a case's: ours, ours_KERNELS, unsloth, unsloth_nogc, trl, trl_nogc",
    )
    add("--parity", action="store_true", help="first: gradient and losses of ours against TRL, beside TRL against TRL")
    add("--parity-steps", type=int, default=1)
    add("--exact-steps", type=int, default=0, help="of parity: steps of TRL in fp32, which all are held against")
    add("--sweep", nargs="*", default=[], metavar="TOKENS:LAYERS", help="other plans of ours to try in capped cases")
    add("--precisions", type=_names, default=[], help="last: ours in these precisions, e.g. fp8,8bit,fp16,4bit,bf16")
    add("--precision-steps", type=int, default=20)
    add("--repeats", type=int, default=3)
    add("--ours-warmup", type=int, default=2)
    add("--ours-steps", type=int, default=6, help="a multiple of 3 times the same pairs as the peers'")
    add("--peer-warmup", type=int, default=1)
    add("--peer-steps", type=int, default=3)
    add("--search", choices=["known", "climb", "all"], default="known",
        help="of a peer's micro-batch: as the case knows it, else from 8 outwards; from 8; or all of them")  # fmt: skip
    add("--search-warmup", type=int, default=1)
    add("--search-steps", type=int, default=2)
    add("--micro-batch", nargs="*", default=[], metavar="ARM=N", help="known best micro-batches, not searched for")
    add("--budget", type=int, help="token budget instead of the plan's")
    add("--recompute", type=int, help="recomputed layers instead of the plan's")
    add("--kernels", help="kernels instead of the plan's: fused, transformers")
    add("--device-gib", type=float, help="memory that all arms share; default: what nvidia-smi says")
    add("--deadline", type=float, help="seconds after which no new block is started")
    add("--after", type=Path, help="a file: nothing is timed before it is there, for another program has the device")
    add("--block-timeout", type=float, default=240.0, help="seconds after which a block's arm is given up")
    add("--load-timeout", type=float, default=LOAD_TIMEOUT)
    add("--out", type=Path, default=Path(tempfile.gettempdir()) / "dpo_throughput.jsonl")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "dpo-throughput-logs")
    add("--report", type=Path, nargs="+", help="print the tables of these result files and end")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
