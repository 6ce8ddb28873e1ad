"""How long the learning rate rises. The rates themselves are in `training.schedule`."""

from __future__ import annotations

import math


def warmup_steps(ratio: float, steps: int) -> int:
    """Steps of a run of `steps` whose rate is below the peak: the share `ratio`, rounded up as Transformers does.

    At least the last step has the peak rate, so a run of one step has no warm-up.
    """
    return min(math.ceil(ratio * steps), steps - 1)
