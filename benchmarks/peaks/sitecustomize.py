"""Python imports this on its start where this folder is on PYTHONPATH: a worker's memory is written down as it ends."""

from __future__ import annotations

import atexit
import json
import os
import sys

VARIABLE = "DPO_ASSETS_PEAKS"


def _write() -> None:
    torch = sys.modules.get("torch")
    path = os.environ.get(VARIABLE)
    if torch is None or not path or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    row = {
        "arguments": sys.argv[1:],
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


if VARIABLE in os.environ:
    atexit.register(_write)
