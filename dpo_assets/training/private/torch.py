"""Private names of PyTorch. Read of 2.11 and 2.13."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

from torch import Tensor

from dpo_assets.training.private.library import Library

TORCH = Library("torch", "2.11 and 2.13", "pip install -c constraints.txt torch")


def check_schema(name: str, op: Any, positional: Sequence[str], keywords: Collection[str], returns: int) -> None:
    """Holds an operator's schema to how it will be called: `positional` by place, "" for one of any name.

    Raises:
        ConfigError: when it takes or returns other things, or needs more.
    """
    schema = op._schema
    by_place = [a.name for a in schema.arguments if not a.kwarg_only]
    by_name = {a.name for a in schema.arguments if a.kwarg_only}
    needed = [a.name for a in schema.arguments if not a.has_default_value()]
    fits = (
        len(by_place) >= len(positional)
        and all(asked in ("", has) for asked, has in zip(positional, by_place, strict=False))
        and by_name.issuperset(keywords)
        and all(arg in by_place[: len(positional)] or arg in keywords for arg in needed)
        and len(schema.returns) == returns
    )
    if not fits:
        raise TORCH.refused(f"has {name} as {schema}")


@dataclass(frozen=True)
class FlashAttention:
    """Flash attention on rows of several lengths that lie end to end.

    Attributes:
        forward: query, key, value, starts of the queries' and of the keys' rows, longest rows of both, dropout,
            causal, debug; `scale`, `window_size_left` and `window_size_right` by name. The first of what it returns are
            the output [T, heads, dim], the logarithm of each sum of exponentials [heads, T], and the two random states.
        backward: the output's gradient, query, key, value, output, that logarithm, the starts and longest rows,
            dropout, causal, the two random states, and the same by name: gradients of query, key and value.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@cache
def flash_attention() -> FlashAttention:
    """`torch.ops.aten._flash_attention_forward` and `_backward`: PyTorch documents none with a window, and none whose
    backward pass takes an output and a logarithm that were changed after the forward."""
    rows = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
    qkv, window = ("query", "key", "value"), ("scale", "window_size_left", "window_size_right")
    names = ("_flash_attention_forward", "_flash_attention_backward")
    forward, backward = (TORCH.find("torch", f"ops.aten.{name}") for name in names)
    check_schema(names[0], forward.default, (*qkv, *rows, "return_debug_mask"), window, returns=5)
    # The random states have had other names, and no meaning here: there is no dropout.
    check_schema(names[1], backward.default, ("grad_out", *qkv, "out", "logsumexp", *rows, "", ""), window, returns=3)
    return FlashAttention(forward, backward)


@cache
def addmm_in_place() -> Callable[..., Tensor]:
    """`torch.ops.aten.addmm.dtype_out`: (into, a, b, dtype, beta=, alpha=, out=) of 16-bit a and b added up in fp32.

    `torch.addmm(out_dtype=)` is documented, and writes into a tensor of its own.
    """
    op = TORCH.find("torch", "ops.aten.addmm.dtype_out")
    check_schema("addmm.dtype_out", op, ("self", "mat1", "mat2", "out_dtype"), ("beta", "alpha", "out"), returns=1)
    made: Callable[..., Tensor] = op
    return made


@dataclass(frozen=True)
class ForEach:
    """One launch for many small tensors.

    Attributes:
        copy: (into, sources): writes each source into its target, cast where formats differ.
        times: (tensors, a number): new tensors.
    """

    copy: Callable[[list[Tensor], list[Tensor]], None]
    times: Callable[[list[Tensor], float], list[Tensor]]


@cache
def for_each() -> ForEach:
    """`torch._foreach_copy_` and `torch._foreach_mul`, which PyTorch's own optimizers are made of."""
    copy, times = TORCH.find("torch", "_foreach_copy_"), TORCH.find("torch", "_foreach_mul")
    ops = TORCH.find("torch", "ops.aten")
    check_schema("_foreach_copy_", ops._foreach_copy_.default, ("self", "src"), (), returns=0)
    check_schema("_foreach_mul", ops._foreach_mul.Scalar, ("self", "scalar"), (), returns=1)
    return ForEach(copy, times)


@cache
def version_of() -> Callable[[Tensor], int]:
    """`Tensor._version`: how many times a tensor was written into; fused optimizers leave it as it was."""
    TORCH.check_has("Tensor", Tensor, ("_version",))
    return attrgetter("_version")
