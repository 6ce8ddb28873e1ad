"""How long a server asks to be left alone before it is asked again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_WAIT = (
    300.0  # Seconds: hosted services count requests over minutes, and whoever asks for hours is not waited for.
)


def asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds by the header Retry-After, a number or a date (RFC 9110, 10.2.3); None where it says neither.

    Args:
        headers: of an answer, whose names are found in any case, as an HTTP client's are.
    """
    told = headers.get("Retry-After", "").strip()
    try:
        seconds = float(told)
    except ValueError:
        try:
            at = parsedate_to_datetime(told)
        except ValueError:
            return None
        # One without a zone is read as GMT, in which the header is to be written.
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def wait(own: float, asked: float | None) -> float:
    """Seconds to wait: at least one's own, and longer where that is asked for, within bounds."""
    return max(own, min(asked or 0.0, LONGEST_WAIT))
