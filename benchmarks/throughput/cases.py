"""What is compared with what, under which memory, and what has to come out. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.throughput.shapes import SHAPES, TINY, is_tiny

# An arm is `who-precision`. `ours` follows its plan, `ours_KERNELS` asks for these kernels. `_nogc` is the peer without
# gradient checkpointing.
OURS = "ours"
PEERS = ("trl", "trl_nogc", "unsloth", "unsloth_nogc")
TINY_MAX_LENGTH = 128
MAX_LENGTH = 1_024


@dataclass(frozen=True)
class Case:
    """Who is timed in turn, under one cap of the allocator's memory (GiB; None: what others leave of the device).

    Attributes:
        known: a peer's best micro-batch where a search on an H100 has found it; the search is left out then.
    """

    model: str
    precision: str
    cap_gib: float | None
    who: tuple[str, ...] = (OURS, "unsloth")
    max_length: int = MAX_LENGTH
    known: Mapping[str, int] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(f"{who}-{self.precision}" for who in self.who)


def _dense(model: str, cap_gib: float, max_length: int = MAX_LENGTH) -> Case:
    """A dense model in bf16."""
    return Case(model, "bf16", cap_gib, known={"unsloth": 8}, max_length=max_length)


# Capped cases come first: peers that no later case needs are released before a case without a cap.
CASES = {
    "tiny": Case(TINY, "fp32", None, (OURS, "trl"), TINY_MAX_LENGTH),
    "tiny-nogc": Case(TINY, "fp32", None, (OURS, "trl_nogc"), TINY_MAX_LENGTH),
    **{
        name: Case(name, "fp32", None, (OURS, "ours_transformers", "trl"), TINY_MAX_LENGTH, {"trl": 8})
        for name in SHAPES
        if is_tiny(name) and name != TINY
    },
    "8b-4bit": Case("8b", "4bit", 10.3, (OURS, "unsloth")),
    "8b-bf16": Case("8b", "bf16", 25.0, (OURS, "unsloth", "trl")),
    "8b-bf16-nocap": Case("8b", "bf16", None, (OURS,)),
    "1b-bf16": Case("1b", "bf16", 6.0, (OURS, "unsloth", "trl")),
    "1b-bf16-nocap": Case("1b", "bf16", None, (OURS, "unsloth_nogc", "trl_nogc")),
    "qwen3-8b-4bit": Case("qwen3-8b", "4bit", 10.3, known={"unsloth": 4}),
    "qwen3-8b-bf16": _dense("qwen3-8b", 26.0),
    "qwen3-1.7b-bf16": _dense("qwen3-1.7b", 10.0),
    "gemma3-4b-bf16": _dense("gemma3-4b", 20.0),
    "gemma3-4b-bf16-2048": _dense("gemma3-4b", 20.0, max_length=2_048),
    "ministral3-8b-bf16": _dense("ministral3-8b", 26.0),
    "phi4-mini-bf16": _dense("phi4-mini", 18.0),
    "olmo3-7b-bf16": _dense("olmo3-7b", 26.0),
    "smollm3-3b-bf16": _dense("smollm3-3b", 14.0),
    "qwen3.5-9b-bf16": Case("qwen3.5-9b", "bf16", 30.0),
    "gpt-oss-20b-bf16": Case("gpt-oss-20b", "bf16", 30.0),
    "qwen3-30b-a3b-bf16": Case("qwen3-30b-a3b", "bf16", 30.0),
}
# Memory (GiB) beyond the bf16 weights that parity and precisions may take: others may still be loading then.
PARITY_ROOM, PRECISION_ROOM = 20.0, 40.0


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
    Target("qwen3-8b-4bit", "unsloth-4bit", 3.2, 2.4),
    Target("qwen3-8b-bf16", "unsloth-bf16", 4.0, 2.9),
    Target("qwen3-1.7b-bf16", "unsloth-bf16", 3.5, 2.6),
    Target("gemma3-4b-bf16", "unsloth-bf16", 3.5, 2.5),
    Target("gemma3-4b-bf16-2048", "unsloth-bf16", 3.5, 2.5),
    Target("ministral3-8b-bf16", "unsloth-bf16", 3.0, 2.2),
    Target("phi4-mini-bf16", "unsloth-bf16", 3.0, 2.2),
    Target("olmo3-7b-bf16", "unsloth-bf16", 3.0, 2.2),
    Target("smollm3-3b-bf16", "unsloth-bf16", 3.0, 2.2),
    Target("qwen3.5-9b-bf16", "unsloth-bf16", 2.0, 1.5),
    Target("gpt-oss-20b-bf16", "unsloth-bf16", 1.5, 1.2),
    Target("qwen3-30b-a3b-bf16", "unsloth-bf16", 1.5, 1.2),
)
FIRST_LOSS_TOLERANCE = 5e-4
PARITY_COSINE, PARITY_NORM = 0.999, 0.01
