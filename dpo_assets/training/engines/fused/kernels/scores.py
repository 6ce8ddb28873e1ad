# mypy: disable-error-code="no-untyped-def"
"""Scores of rows of logits (`ops.scores`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def score_logits(
    logits_ptr, target_ptr, logp_ptr, entropy_ptr, mean_ptr, top1_ptr, grad_ptr,
    logits_stride, grad_stride, VOCABULARY: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits: log-probability of its target, entropy, mean, greedy match, and onehot - softmax."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    logits = logits_ptr + row * logits_stride
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lanes < VOCABULARY
        x = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        known = tl.where(inside, x, 0.0)
        new_top = tl.maximum(top, x)
        # A lane that has seen nothing yet has top = -inf, and -inf - -inf is no number.
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp(top - new_top))
        weight = tl.where(inside, tl.exp(x - new_top), 0.0)
        mass = mass * shrink + weight
        weighted = weighted * shrink + weight * known
        total += known
        top = new_top
    highest = tl.max(top)
    scale = tl.where(top == float("-inf"), 0.0, tl.exp(top - highest))
    all_mass = tl.sum(mass * scale)
    lse = highest + tl.log(all_mass)
    target = tl.load(target_ptr + row)
    wanted = tl.load(logits + target).to(tl.float32)
    tl.store(logp_ptr + row, wanted - lse)
    tl.store(entropy_ptr + row, lse - tl.sum(weighted * scale) / all_mass)
    tl.store(mean_ptr + row, tl.sum(total) / VOCABULARY)
    tl.store(top1_ptr + row, wanted >= highest)
    if WITH_GRAD:
        grad = grad_ptr + row * grad_stride
        for start in range(0, VOCABULARY, BLOCK):
            at = start + lanes
            inside = at < VOCABULARY
            x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.where(at == target, 1.0, 0.0) - tl.exp(x - lse)
            tl.store(grad + at, slope.to(grad_ptr.dtype.element_ty), mask=inside)
