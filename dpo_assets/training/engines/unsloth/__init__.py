"""Unsloth: prepared and loaded (`loading`), and its forward as an engine (`engine`).

Nothing of the training stack is imported here, because whether Unsloth computes is asked before anything is.
"""

from __future__ import annotations

import sys

NAME = "unsloth"  # In `hardware.kernels`, and of the package.


def computes(kernels: str) -> bool:
    """Whether these kernels are Unsloth's, which loads the model itself and replaces TRL's trainer."""
    return kernels == NAME


def is_imported() -> bool:
    """Whether it has patched the training stack of this process."""
    return NAME in sys.modules
