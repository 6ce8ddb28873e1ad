"""Log-probabilities of pairs, scored once per model and pair and kept: of DPO's reference, and of what is evaluated.

The key of a score is what it depends on and nothing else, so the cache survives a change of learning rate, beta, epochs
or output folder, and a refresh scores only new pairs. No weight is hashed: the digests of base, adapters and merged
models are known from their manifests.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from dpo_assets import score_file
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.sqlite_file import prepare_sound
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.packages import computing
from dpo_assets.version import __version__

Fact = str | int | float | bool | None
Scores = list[tuple[float, float]]
PARTS, LARGEST = 10, 4096  # In which scores are computed and kept: a tenth of the pairs, and never more than so many.
SCORING = 4  # Of how a pair is scored: scores that were rounded in another way must not meet the policy's.


def score_key(**facts: Fact) -> str:
    """Digest of everything but the pair that a score depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def pair_key(group: Group) -> str:
    """Digest of the (truncated) token ids of a pair."""
    ids = [list(group.prompt), *[list(c) for c in group.completions]]
    return hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()[:32]


def computed_by(plan: TrainingPlan, kernels: str, forward: str = "") -> dict[str, Fact]:
    """What a score depends on beside the model and the pair: who computed it, in which numbers, and where.

    Args:
        kernels: the engine.
        forward: which of its forwards, where it has several.
    """
    packages = computing(kernels, plan.precision, plan.speedups)
    return {
        "scorer": f"{__version__}, {SCORING}",
        "precision": f"{plan.precision} in {plan.compute}",
        "kernels": forward or kernels,
        "speedups": ",".join(plan.speedups),
        "device": plan.device_name,
        "torch": torch.__version__,  # With the CUDA that it was built for.
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "max_length": plan.max_length,
        "truncation": "keep_start",
    }


class ScoreCache:
    """(score key, pair key) -> (chosen, rejected) log-probabilities, in SQLite: safe for several writers.

    Each score is kept with a digest of itself and its keys: SQLite finds a page that it cannot read, not a number in it
    that became another one. A wrong one is dropped and scored again.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.dropped = 0  # Scores that were not what had been kept.
        self.set_aside = prepare_sound(path, self._prepare)  # Where a damaged file went.

    def _prepare(self) -> None:
        score_file.use(self.path, self.key, time.time())
        self._known()

    def _known(self) -> list[tuple[str, float, float, str]]:
        with closing(sqlite3.connect(self.path, timeout=score_file.PATIENCE)) as db:
            asked = "select pair, chosen, rejected, digest from scores where key = ?"
            return db.execute(asked, (self.key,)).fetchall()

    def get(self, pairs: Sequence[str]) -> dict[str, tuple[float, float]]:
        """The scores that are known."""
        wanted, known, wrong = set(pairs), dict[str, tuple[float, float]](), list[str]()
        for pair, chosen, rejected, digest in self._known():
            if digest != self._digest(pair, chosen, rejected):
                wrong.append(pair)
            elif pair in wanted:
                known[pair] = chosen, rejected
        if wrong:
            self.dropped += len(wrong)
            with closing(sqlite3.connect(self.path, timeout=score_file.PATIENCE)) as db, db:
                db.executemany("delete from scores where key = ? and pair = ?", [(self.key, pair) for pair in wrong])
        return {pair: known[pair] for pair in pairs if pair in known}

    def put(self, scores: dict[str, tuple[float, float]]) -> None:
        with closing(sqlite3.connect(self.path, timeout=score_file.PATIENCE)) as db, db:
            rows = [(self.key, pair, *both, self._digest(pair, *both)) for pair, both in scores.items()]
            db.executemany("insert or replace into scores values (?, ?, ?, ?, ?)", rows)

    def _digest(self, pair: object, chosen: object, rejected: object) -> str:
        """Of the numbers to their last bit, and of whose they are."""
        return hashlib.sha256(repr((self.key, pair, chosen, rejected)).encode()).hexdigest()[:16]

    @property
    def damage(self) -> str:
        """What was lost of the cache and is scored again; empty: nothing."""
        said = []
        if self.set_aside:
            said.append(f"the kept scores were damaged and are set aside as {self.set_aside.name}")
        if self.dropped:
            said.append(f"{self.dropped} kept scores in {self.path.name} were not what had been kept and are dropped")
        return "; ".join(said)


def kept_scores(
    groups: Sequence[Group], cache: ScoreCache | None, score: Callable[[Sequence[Group]], Scores], least: int = 1
) -> tuple[Scores, int]:
    """(chosen, rejected) log-probabilities of every pair, and how many came from the cache.

    What is not finite is not kept: SQLite has no NaN, and a later run may do better.

    Parts do not depend on how many scores are missing: what is left of a pass that was killed falls into the parts that
    the whole pass would have had, whose forwards round as they would have.

    Args:
        least: fewest pairs of a part.
    """
    keys = [pair_key(group) for group in groups]
    known = cache.get(keys) if cache else {}
    missing = [n for n, key in enumerate(keys) if key not in known]
    part = min(LARGEST, max(least, math.ceil(len(groups) / PARTS)))
    fresh: dict[str, tuple[float, float]] = {}
    for start in range(0, len(missing), part):
        chunk = missing[start : start + part]
        scored = {keys[n]: s for n, s in zip(chunk, score([groups[n] for n in chunk]), strict=True)}
        if cache:
            # At once: what a killed run has scored need not be scored again.
            cache.put({key: pair for key, pair in scored.items() if all(map(math.isfinite, pair))})
        fresh |= scored
    scores = known | fresh
    return [scores[key] for key in keys], len(groups) - len(missing)
