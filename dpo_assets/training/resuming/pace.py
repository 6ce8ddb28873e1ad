"""How often a checkpoint is worth its cost."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = 20  # A stage that is shorter than so many times the least wait has a checkpoint about every twentieth of it.


@dataclass
class Pace:
    """When the next checkpoint is due. Times are seconds of one clock.

    Two rules: not sooner than `least_seconds` after the last one, or a twentieth of the stage where that is less; and
    all together, the next one taken to cost what the last did, within `share` of the time since `stage_began`.
    """

    share: float
    least_seconds: float
    stage_began: float
    started: float = 0.0
    first_step: int = 0
    written: int = 0
    spent: float = 0.0
    _last: float = 0.0
    _cost: float = 0.0

    def start(self, now: float, step: int) -> None:
        """Training begins, after `step` steps."""
        self.started = self._last = now
        self.first_step = step

    def due(self, now: float, step: int, steps: int) -> bool:
        """Whether to write one now, with `step` of `steps` done."""
        elapsed, done = now - self.started, step - self.first_step
        if done <= 0:
            return False
        whole = elapsed / done * steps
        waited = now - self._last >= min(self.least_seconds, whole / PARTS)
        return waited and self.spent + self._cost <= self.share * (now - self.stage_began)

    def wrote(self, before: float, now: float) -> None:
        """One held the training up between these times."""
        self._cost = now - before
        self.spent += self._cost
        self.written += 1
        self._last = now
