"""The programme of a session: search, timed repeats in turn, parity, precisions. Knows no torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.throughput.cases import (
    MAX_LENGTH,
    OURS,
    PARITY_ROOM,
    PRECISION_ROOM,
    TINY_MAX_LENGTH,
    Case,
)
from benchmarks.throughput.coordinator import Session
from benchmarks.throughput.shapes import SHAPES, is_tiny

EXACT = "trl in fp32"
MICRO_BATCHES = (2, 4, 8, 16)
FIRST_TRIED = 8
LOAD_TIMEOUT = 420.0


@dataclass(frozen=True)
class Settings:
    """How much is run."""

    repeats: int = 3
    ours_warmup: int = 2
    ours_steps: int = 6
    peer_warmup: int = 1
    peer_steps: int = 3
    search: str = "known"  # known: of a case's known micro-batches; else climb or all.
    search_warmup: int = 1
    search_steps: int = 2
    micro_batches: dict[str, int] = field(default_factory=dict)  # Known best ones, by arm: not searched for.
    overrides: dict[str, Any] = field(default_factory=dict)
    parity_steps: int = 1
    exact_steps: int = 0  # fp32 has no tensor cores here: a step of TRL takes seconds.
    sweep: tuple[tuple[int, int], ...] = ()  # Other plans of ours to try: (token budget, recomputed layers).
    precision_steps: int = 20

    def block(self, arm: str, max_length: int, cap_gib: float | None, **more: Any) -> dict[str, Any]:
        """The command's block of one timed run."""
        ours = is_ours(arm)
        values = {
            "warmup": self.ours_warmup if ours else self.peer_warmup,
            "steps": self.ours_steps if ours else self.peer_steps,
            "max_length": max_length,
            "cap_gib": cap_gib,
            "overrides": self.overrides if ours else {},
        }
        return values | more

    def known(self, case: Case, arm: str) -> int | None:
        """A peer's best micro-batch, where nobody has to search for it."""
        found = case.known.get(arm.partition("-")[0]) if self.search == "known" else None
        return self.micro_batches.get(arm, found)


def is_ours(arm: str) -> bool:
    return arm.startswith(OURS)


def max_length_of(shape: str) -> int:
    return TINY_MAX_LENGTH if is_tiny(shape) else MAX_LENGTH


def parity_cap(shape: str, precision: str) -> float | None:
    """Parity runs while other arms still load, so it takes no more than this (GiB)."""
    return None if is_tiny(shape) else SHAPES[shape].gib * (2 if precision == "fp32" else 1) + PARITY_ROOM


def precision_cap(shape: str) -> float | None:
    """Precisions are timed while the others' weights lie on the device."""
    return None if is_tiny(shape) else SHAPES[shape].gib + PRECISION_ROOM


def start_arms(session: Session, cases: Iterable[Case], settings: Settings, extra: Iterable[str], wait: float) -> None:
    """Starts every arm of the cases at once; each trains one step under the cap of its first case."""
    first: dict[str, dict[str, Any]] = {}
    for case in cases:
        for arm in case.arms:
            micro = None if is_ours(arm) else settings.known(case, arm) or FIRST_TRIED
            block = settings.block(arm, case.max_length, case.cap_gib, micro_batch=micro, warmup=0, steps=1)
            first.setdefault(arm, block)
    for arm in extra:
        micro = None if is_ours(arm) else settings.micro_batches.get(arm, FIRST_TRIED)
        cap = parity_cap(session.shape, arm.partition("-")[2])
        block = settings.block(arm, max_length_of(session.shape), cap, micro_batch=micro, warmup=0, steps=1)
        first.setdefault(arm, block)
    session.start({arm: (block, {}) for arm, block in first.items()}, wait)


def run_case(session: Session, name: str, case: Case, settings: Settings) -> None:
    """Best micro-batch of each peer, then all arms in turn, `repeats` times."""
    best: dict[str, int | None] = {}
    for arm in case.arms:
        if arm not in session.workers:
            session.record.write("time", case=name, arm=arm, error="arm did not load")
            continue
        found = None if is_ours(arm) else _best_micro_batch(session, name, case, arm, settings)
        if found is None and not is_ours(arm):
            session.record.write("time", case=name, arm=arm, error="no micro-batch was possible")
            continue
        best[arm] = found
    for repeat in range(1, settings.repeats + 1):
        for arm, micro in best.items():
            if not session.time_left():
                session.record.say(f"deadline: {name} stops in repeat {repeat}")
                return
            block = settings.block(arm, case.max_length, case.cap_gib, micro_batch=micro)
            answer = session.train(arm, block, {})
            if micro is not None:
                answer["micro_batch"] = micro
            session.record.write(
                "time", case=name, arm=arm, repeat=repeat, cap_gib=case.cap_gib, overrides=block["overrides"], **answer
            )


def sweep_plans(session: Session, name: str, case: Case, settings: Settings) -> None:
    """Ours under the case's cap with other plans than the planner's: is there a faster one?"""
    arm = next(arm for arm in case.arms if is_ours(arm))
    for budget, recomputed in settings.sweep:
        if not session.time_left():
            return
        plan = {"token_budget": budget, "recomputed_layers": recomputed, "gradient_checkpointing": recomputed > 0}
        block = settings.block(arm, case.max_length, case.cap_gib, overrides=plan)
        answer = session.train(arm, block, {})
        session.record.write("sweep", case=name, arm=arm, cap_gib=case.cap_gib, overrides=plan, **answer)


def _best_micro_batch(session: Session, name: str, case: Case, arm: str, settings: Settings) -> int | None:
    """The fastest of MICRO_BATCHES that fits; a known one is taken as it is, unless it did not fit at loading."""
    known = settings.known(case, arm)
    if known and arm not in session.out_of_memory:
        return known
    speeds: dict[int, float] = {}

    def tried(micro: int) -> float:
        """Pairs/s by the fastest step, because the first ones may still compile; 0 when it does not fit."""
        if micro not in speeds:
            speeds[micro] = _search_speed(session, name, case, arm, micro, settings) if session.time_left() else 0.0
        return speeds[micro]

    if settings.search == "all":
        for micro in MICRO_BATCHES:
            tried(micro)
    else:
        _climb(tried)
    fitting = {micro: speed for micro, speed in speeds.items() if speed > 0}
    return max(fitting, key=lambda micro: fitting[micro]) if fitting else None


def _climb(tried: Any) -> None:
    """From 8 upwards while it gets faster, else downwards: speed rises with the micro-batch until it falls for good."""
    at = MICRO_BATCHES.index(FIRST_TRIED)
    upwards = tried(MICRO_BATCHES[at]) > 0 and tried(MICRO_BATCHES[at + 1]) > tried(MICRO_BATCHES[at])
    if upwards:
        return
    while at > 0:
        slower = tried(MICRO_BATCHES[at - 1]) < tried(MICRO_BATCHES[at])
        if slower:
            return
        at -= 1


def _search_speed(session: Session, name: str, case: Case, arm: str, micro: int, settings: Settings) -> float:
    block = settings.block(
        arm, case.max_length, case.cap_gib,
        micro_batch=micro, warmup=settings.search_warmup, steps=settings.search_steps,
    )  # fmt: skip
    answer = session.train(arm, block, {})
    answer["micro_batch"] = micro
    session.record.write("search", case=name, arm=arm, cap_gib=case.cap_gib, **answer)
    return 0.0 if "error" in answer else 16 / min(answer["step_seconds"])


def run_parity(session: Session, ours: Iterable[str], peer: str, exact: str | None, settings: Settings) -> None:
    """Step-1 gradient and losses of each of ours against TRL, beside TRL against itself at another micro-batch.

    `exact` is TRL in fp32: trainers that round differently are all held against it.
    """
    folder = Path(tempfile.mkdtemp(prefix="dpo-throughput-parity-", dir=session.folder.parent))
    runs: dict[str, tuple[str, int | None]] = {"trl": (peer, 8), "trl at micro-batch 2": (peer, 2)}
    runs |= {arm.partition("-")[0]: (arm, None) for arm in ours}
    if exact:
        runs[EXACT] = (exact, 4)
    losses: dict[str, list[float]] = {}
    try:
        for name, (arm, micro) in runs.items():
            if not session.time_left():
                return
            gradient = _gradient(folder, name)
            steps = settings.exact_steps if name == EXACT else settings.parity_steps
            block = settings.block(
                arm, max_length_of(session.shape), parity_cap(session.shape, arm.partition("-")[2]),
                micro_batch=micro, warmup=0, steps=steps, max_grad_norm=1e9, gradient=str(gradient),
            )  # fmt: skip
            answer = session.train(arm, block, {})
            session.record.write("parity-run", arm=arm, what=name, **answer)
            if "error" in answer:
                continue
            losses[name] = answer["losses"]
            if name not in ("trl", EXACT) and "trl" in losses:
                found = gradient_distance(folder / "trl.safetensors", gradient)
                differences = [abs(a - b) for a, b in zip(losses["trl"], losses[name], strict=True)]
                session.record.write(
                    "parity", what=name, arm=arm, steps=len(differences), largest_loss_difference=max(differences),
                    first_loss_difference=differences[0], curve_trl=losses["trl"], curve=losses[name], **found,
                )  # fmt: skip
        for name in [n for n in losses if EXACT in losses and n != EXACT]:
            found = gradient_distance(_gradient(folder, EXACT), _gradient(folder, name))
            differences = [abs(a - b) for a, b in zip(losses[EXACT], losses[name], strict=False)]
            session.record.write(
                "parity-exact", what=name, steps=len(differences), largest_loss_difference=max(differences),
                curve_exact=losses[EXACT], curve=losses[name], **found,
            )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _gradient(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-')}.safetensors"


def gradient_distance(reference: Path, other: Path) -> dict[str, Any]:
    """Cosine and norm ratio of two adapter gradients over all matrices, and the lowest cosine of one matrix."""
    import numpy as np
    from safetensors.numpy import load_file

    a, b = load_file(reference), load_file(other)
    if a.keys() != b.keys():
        return {"error": f"different matrices: {sorted(a.keys() ^ b.keys())[:4]}"}
    dot = norm_a = norm_b = 0.0
    lowest, where = 2.0, ""
    for name in a:
        x, y = a[name].ravel().astype(np.float64), b[name].ravel().astype(np.float64)
        products = float(x @ y), float(x @ x), float(y @ y)
        dot, norm_a, norm_b = dot + products[0], norm_a + products[1], norm_b + products[2]
        if products[1] > 0 and products[2] > 0:
            cosine = products[0] / (products[1] * products[2]) ** 0.5
            lowest, where = (cosine, name) if cosine < lowest else (lowest, where)
    return {
        "cosine": dot / (norm_a * norm_b) ** 0.5,
        "norm_ratio": (norm_b / norm_a) ** 0.5,
        "lowest_matrix_cosine": lowest,
        "lowest_matrix": where,
    }


def run_precisions(session: Session, precisions: Iterable[str], settings: Settings) -> None:
    """Ours in each precision: first loss, pairs/s, peak."""
    length = max_length_of(session.shape)
    for precision in precisions:
        arm = f"{OURS}-{precision}"
        if not session.time_left():
            return
        if arm not in session.workers:
            session.record.write("precision", arm=arm, error="arm did not load")
            continue
        block = settings.block(arm, length, precision_cap(session.shape), steps=settings.precision_steps)
        session.record.write("precision", arm=arm, overrides=block["overrides"], **session.train(arm, block, {}))


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All rows of some result files."""
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line]
