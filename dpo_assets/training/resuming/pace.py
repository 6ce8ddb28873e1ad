"""How often a checkpoint is worth its cost."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = 20  # A checkpoint is due every twentieth of a stage's steps, where that comes before the least wait.
AGAIN = 10  # A try that is killed may cost a tenth of a stage's steps a second time.


@dataclass
class Pace:
    """When the next checkpoint is due, and how long the training may wait for one. Times are seconds of one clock.

    Two limits. A kill costs at most a tenth of the stage's steps, or one step where it has fewer than ten: so one is
    due every twentieth of them, or after `least_seconds` where that is sooner, and the training waits for its writer
    where going on would pass the tenth. And all together, with these waits, they hold the training up for no more than
    `share` of the time since `stage_began`, the next one taken to cost what the last did.

    Where both cannot hold, the second does: every run pays for its checkpoints, and only one that is killed does steps
    twice. A kill then costs the time in which the share pays for the next one: at most twice its cost over `share`.
    """

    share: float
    least_seconds: float
    stage_began: float
    written: int = 0
    spent: float = 0.0
    _last: float = 0.0
    _last_step: int = 0
    _cost: float = 0.0

    def start(self, now: float, step: int) -> None:
        """Training begins, after `step` steps."""
        self._last, self._last_step = now, step

    def due(self, now: float, step: int, steps: int) -> bool:
        """Whether to write one now, with `step` of `steps` done."""
        done = step - self._last_step
        if done <= 0:
            return False
        waited = now - self._last >= self.least_seconds or done >= max(1, steps // PARTS)
        return waited and self._cost <= self.left(now)

    def wrote(self, before: float, now: float, step: int) -> None:
        """That of `step` held the training up between these times."""
        self._cost = now - before
        self.spent += self._cost
        self.written += 1
        self._last, self._last_step = now, step

    def waited(self, seconds: float) -> None:
        """The training stood still for a checkpoint that was still being written."""
        self.spent += seconds

    def left(self, now: float) -> float:
        """Seconds that the training may still be held up by now."""
        return max(0.0, self.share * (now - self.stage_began) - self.spent)


def most_again(steps: int) -> int:
    """Steps of so many that a kill may cost a second time."""
    return max(1, steps // AGAIN)
