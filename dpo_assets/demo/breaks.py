"""Ways to break the demo on purpose, to see which check stops the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpo_assets.feedback.sources.finding import BUILTIN_FEEDBACK

EVERY = 2  # Every second line of the export is cut in half: the disk was full.


@dataclass(frozen=True)
class Break:
    """A fault, the check that must catch it, and the run config that brings it in."""

    check: str
    story: str
    run_config: Callable[[str, Path], dict[str, Any]]


def _plan(**dpo: Any) -> Callable[[str, Path], dict[str, Any]]:
    return lambda pipeline, home: {f"{pipeline}__dpo_plan": {"config": {"dpo": dpo}}}


def _damaged_export(pipeline: str, home: Path) -> dict[str, Any]:
    source = Path(str(files("dpo_assets") / BUILTIN_FEEDBACK["oasst"]))
    lines = source.read_bytes().splitlines(keepends=True)
    damaged = home / "break" / "feedback_cut_off.jsonl"
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_bytes(b"".join(line[: len(line) // 2] + b"\n" if n % EVERY else line for n, line in enumerate(lines)))
    return {f"{pipeline}__raw_preferences": {"config": {"paths": [str(damaged)]}}}


BREAKS: dict[str, Break] = {
    "learning-rate": Break(
        "learning_rate_band", "a learning rate of 1e-3, copied from an SFT recipe", _plan(learning_rate=1e-3)
    ),
    "beta": Break(
        "beta_for_loss", "the loss sigmoid_norm with the beta of sigmoid, 0.1", _plan(loss="sigmoid_norm", beta=0.1)
    ),
    "reference": Break(
        "reference_is_start",
        "log-ratios against the base, though training starts at the SFT adapter",
        _plan(reference="base"),
    ),
    "data": Break("quarantine_rate", "an export whose every second line was cut off", _damaged_export),
}
