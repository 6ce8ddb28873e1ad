"""Private names of Liger. Read of 0.8.5."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from dpo_assets.training.private.library import Library

LIGER = Library("liger-kernel", "0.8.5", "pip install 'dpo-assets[liger]', or leave `liger` out of hardware.speedups.")
MODULE = "liger_kernel.transformers.monkey_patch"


@dataclass(frozen=True)
class Patches:
    """Liger's kernels for a model that is loaded already.

    Attributes:
        known: the model types that it has layers for (`MODEL_TYPE_TO_APPLY_LIGER_FN`).
        apply: (model, and which kernels by name), `_apply_liger_kernel_to_instance`: it hands each name on to where a
            type's own function takes it.
    """

    known: Collection[str]
    apply: Callable[..., None]


@cache
def patches() -> Patches:
    """Of `monkey_patch`; what Liger documents patches classes before a model is made, for the whole process."""
    known = LIGER.find(MODULE, "MODEL_TYPE_TO_APPLY_LIGER_FN")
    apply: Any = LIGER.find(MODULE, "_apply_liger_kernel_to_instance")
    LIGER.check_call("_apply_liger_kernel_to_instance", apply, ("model",), passes_on=True)
    return Patches(known, apply)
