"""Numbers that several measures of a dataset share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DIGITS = 6
EXAMPLES, SNIPPET = 5, 120  # Worst pairs kept of a kind, and their letters.


def paired_auc(difference: NDArray[np.generic]) -> float | None:
    """AUC of a difference "chosen minus rejected" as a score for which answer is the chosen one, ties half.

    Each pair is asked both ways round, as d and as -d: the AUC is the chance that a d exceeds a -d. One half says
    nothing, 1 tells every label. It is None without pairs.
    """
    import numpy as np

    if not difference.size:
        return None
    values = np.sort(difference)
    left, right = (np.searchsorted(values, -values, side=side).sum() for side in ("left", "right"))
    return float((values.size**2 - right + 0.5 * (right - left)) / values.size**2)


def rounded(value: float | None) -> float | None:
    """Equal data must give equal bytes on every machine, whatever the last bits of a sum are there."""
    return None if value is None or not math.isfinite(value) else round(value, DIGITS)


def sparse(counts: Mapping[int, int]) -> dict[str, int]:
    """Counts by number of their bin, without the empty ones: how a histogram stands in a report."""
    return {str(bin_): count for bin_, count in sorted(counts.items()) if count}


def place(row: dict[str, Any]) -> str:
    """Where a pair was read."""
    return f"{row['source']}:{row['line']}"
