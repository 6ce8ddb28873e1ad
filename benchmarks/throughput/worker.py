"""One arm in a process of its own. Commands come as JSON lines on standard input, answers go as JSON lines to a pipe.

    python -m benchmarks.throughput.worker --arm ours-bf16 --shape 1b --folder FOLDER --answers FD

Standard output and error are the log: the libraries print there. Commands:

    {"do": "load", "block": {...} | null}        load, and train one untimed block, so that compiling is done with
    {"do": "train", "block": {...}, "rows": {...}}   train and answer with what was measured
    {"do": "device"}                             what this machine is
    {"do": "release"}                            end

An answer is the measured values, or `error` with `out_of_memory`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.throughput import data
from benchmarks.throughput.arithmetic import Arithmetic, limit_pairs_per_s, read_arithmetic, work_of
from benchmarks.throughput.shapes import SHAPES, is_tiny

TINY_SCALE = 0.1


class Worker:
    """Holds the arm and answers commands."""

    def __init__(self, arm: str, shape: str, folder: Path) -> None:
        self.shape = shape
        self.who, _, self.precision = arm.partition("-")
        self.folder = folder
        self.corpus: list[int] = []
        self.arithmetic: Arithmetic | None = None
        self.arm = self._arm()

    def _arm(self) -> Any:
        if self.who.startswith("unsloth") or self.who == "ours_unsloth":
            # Before anything that imports TRL, PEFT or Transformers.
            importlib.import_module("unsloth")
        targets = SHAPES[self.shape].targets
        who, _, kernels = self.who.partition("_")
        if who == "ours":
            from benchmarks.throughput.ours import OursArm

            arm: Any = OursArm(self.folder, self.precision, targets, kernels or "auto")
        else:
            from benchmarks.throughput.peers import TrlArm, UnslothArm

            kind = UnslothArm if self.who.startswith("unsloth") else TrlArm
            arm = kind(self.folder, self.precision, targets, checkpointing=not self.who.endswith("_nogc"))
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        return arm

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "load":
                begun = time.perf_counter()
                self.corpus, self.arithmetic = data.read_corpus(self.folder), read_arithmetic(self.folder)
                self.arm.load()
                weights = time.perf_counter() - begun
                warm = self.train(command["block"], command["rows"]) if command.get("block") else {}
                return {
                    "load_seconds": time.perf_counter() - begun,
                    "weights_seconds": weights,
                    "warm_error": warm.get("error"),
                    "warm_out_of_memory": warm.get("out_of_memory"),
                }
            case "train":
                return self.train(command["block"], command["rows"])
            case "device":
                return device_facts()
        raise ValueError(f"no command {command['do']!r}")

    def train(self, block: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
        """Trains one block and adds what the timed pairs amount to."""
        from benchmarks.throughput.measure import Block, free_memory, is_out_of_memory

        values = block | {"gradient": Path(block["gradient"]) if block.get("gradient") else None}
        wanted = Block(**values)
        made = data.block(self._make(rows, wanted.max_length), wanted.warmup, wanted.steps)
        try:
            found = self.arm.run(made, wanted).as_dict()
        except Exception as error:  # Whatever fails in a library: the other arms go on.
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:800], "out_of_memory": is_out_of_memory(error)}
        else:
            timed = made[wanted.warmup * data.PAIRS_PER_STEP :]
            assert self.arithmetic is not None
            result = found | rates(found, timed, wanted.max_length, self.arithmetic)
        free_memory()
        return result

    def _make(self, rows: dict[str, Any], max_length: int) -> Any:
        if "ratio" in rows:
            return partial(_near_max_length, self.corpus, rows["ratio"], max_length)
        return partial(_like_ultrafeedback, self.corpus, TINY_SCALE if is_tiny(self.shape) else 1.0)


def _near_max_length(corpus: list[int], ratio: float, max_length: int, count: int, seed: int) -> list[data.Row]:
    return data.near_max_length(corpus, count, seed, ratio, max_length)


def _like_ultrafeedback(corpus: list[int], scale: float, count: int, seed: int) -> list[data.Row]:
    return data.like_ultrafeedback(corpus, count, seed, scale)


def rates(found: dict[str, Any], timed: list[data.Row], max_length: int, model: Arithmetic) -> dict[str, Any]:
    """Pairs and tokens a second; share of the arithmetic limit of an H200; one epoch with its reference pass."""
    import torch

    work = work_of(timed, max_length)
    warm = work.pairs / found["seconds"]
    reference = found.get("reference_pairs_per_s")
    # A peer scores its reference in every step, so its epoch is the same with and without.
    cold = 1 / (1 / warm + 1 / reference) if reference else warm
    limit = limit_pairs_per_s(model, work) if torch.cuda.is_available() else None
    return {
        "pairs_per_s": warm,
        "cold_pairs_per_s": cold,
        "unshared_tokens_per_s": work.unshared_tokens / found["seconds"],
        "unshared_tokens_per_pair": work.unshared_tokens / work.pairs,
        "shared_tokens_per_pair": work.shared_tokens / work.pairs,
        "limit_pairs_per_s": limit,
        "share_of_limit": warm / limit if limit else None,
    }


def device_facts() -> dict[str, Any]:
    """Device and package versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "device_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--answers", type=int, required=True, help="file descriptor of the pipe")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    commands = _commands()
    with os.fdopen(args.answers, "w") as answers:

        def reply(value: dict[str, Any]) -> None:
            answers.write(json.dumps(value) + "\n")
            answers.flush()

        worker, failed = _worker(args.arm, args.shape, args.folder)
        while (command := commands.get())["do"] != "release":
            try:
                reply(worker.answer(command) if worker else failed)
            except Exception as error:  # An arm that cannot load says why.
                traceback.print_exc()
                reply({"error": f"{type(error).__name__}: {error}"[:800], "out_of_memory": False})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Compile workers and device contexts of the libraries take seconds to wind up.


def _worker(arm: str, shape: str, folder: Path) -> tuple[Worker | None, dict[str, Any]]:
    """The worker, its libraries imported while the model may still be in the making; or why it cannot start."""
    try:
        return Worker(arm, shape, folder), {}
    except Exception as error:
        traceback.print_exc()
        return None, {"error": f"{type(error).__name__}: {error}"[:800], "out_of_memory": False}


def _commands() -> queue.Queue[dict[str, Any]]:
    """Commands as they come. When the coordinator dies, standard input closes and this process ends at once."""
    found: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return found


if __name__ == "__main__":
    main()
