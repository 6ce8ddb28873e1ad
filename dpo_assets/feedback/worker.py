"""The process that reads spans of feedback files: `python -m dpo_assets.feedback.worker`. See `reading`."""

from __future__ import annotations

import os
import sys

from dpo_assets.feedback.reading import serve


def main() -> None:
    """Serves jobs. What a reader prints goes to standard error: standard output belongs to the outcomes."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as outcomes:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin.buffer, outcomes)


if __name__ == "__main__":
    main()
