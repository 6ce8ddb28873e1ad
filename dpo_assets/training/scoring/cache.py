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
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import torch

from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.packages import computing
from dpo_assets.version import __version__

Fact = str | int | float | bool | None
Scores = list[tuple[float, float]]
PARTS = 10  # In which scores are computed and kept.
SCORING = 3  # Of how a pair is scored: scores that were rounded in another way must not meet the policy's.


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
    """(score key, pair key) -> (chosen, rejected) log-probabilities, in SQLite: safe for several writers."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.set_aside: Path | None = None  # Where a damaged file went.
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._create()
            self._known()
        except sqlite3.OperationalError:
            raise  # A lock, or a full disk: the file itself is well.
        except sqlite3.DatabaseError:
            # Scores can be computed again, so a file that a crash or a disk has damaged must not stop every run.
            self.set_aside = path.with_name(f"{path.name}.damaged-{uuid4().hex[:8]}")
            path.rename(self.set_aside)
            self._create()

    def _create(self) -> None:
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            db.execute(
                "create table if not exists reference (key text, pair text, chosen real, rejected real, "
                "primary key (key, pair)) without rowid"
            )

    def _known(self) -> list[tuple[str, float, float]]:
        with closing(sqlite3.connect(self.path, timeout=60)) as db:
            return db.execute("select pair, chosen, rejected from reference where key = ?", (self.key,)).fetchall()

    def get(self, pairs: Sequence[str]) -> dict[str, tuple[float, float]]:
        """The scores that are known."""
        rows = self._known()
        known = {pair: (chosen, rejected) for pair, chosen, rejected in rows}
        return {pair: known[pair] for pair in pairs if pair in known}

    def put(self, scores: dict[str, tuple[float, float]]) -> None:
        with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
            rows = [(self.key, pair, chosen, rejected) for pair, (chosen, rejected) in scores.items()]
            db.executemany("insert or replace into reference values (?, ?, ?, ?)", rows)


def kept_scores(
    groups: Sequence[Group], cache: ScoreCache | None, score: Callable[[Sequence[Group]], Scores], least: int = 1
) -> tuple[Scores, int]:
    """(chosen, rejected) log-probabilities of every pair, and how many came from the cache.

    What is not finite is not kept: SQLite has no NaN, and a later run may do better.

    Args:
        least: fewest pairs of a part.
    """
    keys = [pair_key(group) for group in groups]
    known = cache.get(keys) if cache else {}
    missing = [n for n, key in enumerate(keys) if key not in known]
    part = max(least, math.ceil(len(missing) / PARTS))
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
