"""Fits the constants of `planning/speed.py` to the measured blocks, and prints each block's error.

    python -m benchmarks.fit_speed             # what the constants of the code predict
    python -m benchmarks.fit_speed --fit 8000  # a random search from there, as lines to copy

New blocks go into `dpo_assets_tests/planning/measured.py`, where tests hold predictions and peaks to them. The search
moves the shared shares and each measured engine's two constants by factors, and keeps what lowers the sum of squared
logarithms of predicted over measured pairs a second.
"""

from __future__ import annotations

import argparse
import math
import random

from dpo_assets.planning import speed
from dpo_assets.planning.cards import find_card
from dpo_assets.planning.speed import ENGINE_COSTS, Engine
from dpo_assets_tests.planning.measured import BLOCKS, PAIRS, Block

SHARED = ("GEMM_SHARE", "ATTENTION_SHARE", "HALF_RATE_WIDTH")
MEASURED = tuple({(block.kernels, block.trainer): None for block in BLOCKS})
BACK = 1.5  # A backward pass launches about one and a half times what a forward pass does.
HIGHEST_SHARE = 0.8  # 790 TFLOP/s of a card's 989, which one H200 was measured at.


def predicted(block: Block) -> float:
    """Pairs a second."""
    return PAIRS / block.training.seconds(block.work, block.budget, block.recomputed, find_card(block.card))


def loss() -> float:
    return sum(math.log(predicted(block) / block.pairs_per_s) ** 2 for block in BLOCKS)


def read() -> list[float]:
    """The constants of the code, as one list."""
    engines = [value for key in MEASURED for value in (ENGINE_COSTS[key].traffic, ENGINE_COSTS[key].launch[0])]
    return [float(getattr(speed, name)) for name in SHARED] + engines


def write(values: list[float]) -> None:
    """Puts constants in their places, in this process."""
    for name, value in zip(SHARED, values, strict=False):
        setattr(speed, name, value)
    rest = values[len(SHARED) :]
    for key, traffic, launch in zip(MEASURED, rest[::2], rest[1::2], strict=True):
        ENGINE_COSTS[key] = Engine(traffic, (launch, BACK * launch), ENGINE_COSTS[key].recomputed)


def fit(rounds: int, seed: int = 0) -> list[float]:
    """The best constants of a random search."""
    chance = random.Random(seed)
    best, least, step = read(), loss(), 0.3
    for number in range(rounds):
        tried = [value * math.exp(chance.gauss(0, step)) if chance.random() < 0.4 else value for value in best]
        write(tried)
        if tried[0] <= HIGHEST_SHARE and (found := loss()) < least:
            best, least = tried, found
        if number % max(1, rounds // 6) == rounds // 6 - 1:
            step *= 0.6
    write(best)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=0, metavar="ROUNDS")
    rounds = parser.parse_args().fit
    if rounds:
        fit(rounds)
        for name in SHARED:
            print(f"{name} = {getattr(speed, name):.3g}")
        for key in MEASURED:
            forward, back = ENGINE_COSTS[key].launch
            print(f"{key}: Engine({ENGINE_COSTS[key].traffic:.3g}, ({forward:.2g}, {back:.2g}))")
    for block in BLOCKS:
        error = predicted(block) / block.pairs_per_s - 1
        print(f"{block.label:<56} {block.pairs_per_s:7.2f} {predicted(block):7.2f} {100 * error:+6.1f} %")
    print(f"sum of squared logarithms: {loss():.3f}")


if __name__ == "__main__":
    main()
