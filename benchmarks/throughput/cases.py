"""What is compared with what, under which memory, and what has to come out. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# An arm is `who-precision`. `_nogc` is the peer without gradient checkpointing; ours follows its plan.
OURS = "ours"
PEERS = ("trl", "trl_nogc", "unsloth", "unsloth_nogc")


@dataclass(frozen=True)
class Case:
    """Arms that are timed in turn under one cap of the allocator's memory (GiB; None: the whole device)."""

    model: Literal["tiny", "1b", "8b"]
    cap_gib: float | None
    arms: tuple[str, ...]


# Capped cases come first: peers that no later case needs are released before a case without a cap.
CASES = {
    "tiny": Case("tiny", None, ("ours-fp32", "trl-fp32")),
    "tiny-nogc": Case("tiny", None, ("ours-fp32", "trl_nogc-fp32")),
    "8b-4bit": Case("8b", 10.3, ("ours-4bit", "unsloth-4bit")),
    "8b-bf16": Case("8b", 25.0, ("ours-bf16", "unsloth-bf16", "trl-bf16")),
    "8b-bf16-nocap": Case("8b", None, ("ours-bf16",)),
    "1b-bf16": Case("1b", 6.0, ("ours-bf16", "unsloth-bf16", "trl-bf16")),
    "1b-bf16-nocap": Case("1b", None, ("ours-bf16", "unsloth_nogc-bf16", "trl_nogc-bf16")),
}
# Parity runs while other arms still load, so it takes no more than this (GiB).
PARITY_CAP = {"tiny": None, "1b": 24.0, "8b": 60.0}
# Precisions are timed while the others' weights lie on the device.
PRECISION_CAP = {"tiny": None, "1b": 40.0, "8b": 60.0}


@dataclass(frozen=True)
class Target:
    """Least ratio of ours to a peer's pairs/s; or the least share of the arithmetic `limit`; or the least `pairs/s`.

    `warm`: with a cached reference. `cold`: one epoch with its reference pass.
    """

    case: str
    against: str
    warm: float
    cold: float | None = None


TARGETS = (
    Target("8b-4bit", "unsloth-4bit", 2.5, 2.0),
    Target("8b-bf16", "unsloth-bf16", 2.5),
    Target("8b-bf16", "trl-bf16", 4.0),
    Target("8b-bf16-nocap", "limit", 0.60),
    Target("1b-bf16", "pairs/s", 50.0),
    Target("1b-bf16", "unsloth-bf16", 5.0),
    Target("1b-bf16-nocap", "limit", 0.45),
    Target("1b-bf16-nocap", "unsloth_nogc-bf16", 2.3),
)
FIRST_LOSS_TOLERANCE = 5e-4
PARITY_COSINE, PARITY_NORM = 0.999, 0.01
