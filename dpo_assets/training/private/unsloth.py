"""Private names of Unsloth. Read of 2026.10.9. Nothing here imports it, or what it patches, before it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from dpo_assets.training.private.library import Library

UNSLOTH = Library(
    "unsloth",
    "2026.10.9",
    "pip install 'dpo-assets[unsloth]', or set hardware.kernels to `auto`.",
)
COMPILE_CACHE = "UNSLOTH_COMPILE_LOCATION"  # Where it writes the modules that it generates.
NO_STATISTICS = "UNSLOTH_DISABLE_STATISTICS"
TABLE = "prefix_seg_info"  # The argument of its forwards that tells shared prefixes; every forward swallows it.


@cache
def shared_prefix_table() -> Callable[..., tuple[Any, Any]]:
    """`utils.prefix_grouper_kernel.build_seg_info_multigroup`: (groups, device) -> (the table, its groups' places).

    Checked with it: that attention still asks for the table under the name that it is handed on by, which
    `**kwargs` would swallow otherwise, and every token would see what lies before it in the batch.
    """
    build: Any = UNSLOTH.find("unsloth.utils.prefix_grouper_kernel", "build_seg_info_multigroup")
    UNSLOTH.check_call("build_seg_info_multigroup", build, ("group_specs", "device"))
    asked = UNSLOTH.find("unsloth.utils.attention_dispatch", "resolve_prefix_seg_info")
    if TABLE not in asked.__code__.co_consts:
        raise UNSLOTH.refused(f"has an attention that does not ask for `{TABLE}`")
    fields = UNSLOTH.find("unsloth.utils.attention_dispatch", "AttentionContext.__dataclass_fields__")
    if TABLE not in fields:
        raise UNSLOTH.refused(f"has no {TABLE} in AttentionContext")
    made: Callable[..., tuple[Any, Any]] = build
    return made


def has_own_attention(lm: Any) -> bool:
    """Whether a model's attention is Unsloth's own: it replaces the forward by a function of `unsloth.models`."""
    forward = type(lm.get_decoder().layers[0].self_attn).forward
    return bool(forward.__module__.startswith("unsloth.models."))
