"""The Triton kernels against what `ops` says in PyTorch. They run on a GPU, or anywhere in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.ops import Angles
from dpo_assets.training.engines.fused.weights import Nf4, RowScaled

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
runnable = pytest.mark.skipif(
    ops.kernels is None or not (GPU or ops.INTERPRETED),
    reason="needs Triton with a GPU, or TRITON_INTERPRET=1 with Triton installed",
)
pytestmark = runnable
WIDTH, DTYPES = 96, [torch.bfloat16, torch.float16] if GPU else [torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(1)
    value: torch.dtype = request.param
    return value


def randn(*shape: int, dtype: torch.dtype, pad: int = 0) -> Tensor:
    """Random values; with `pad` a column slice of a wider matrix."""
    wide = torch.randn(*shape[:-1], shape[-1] + pad, device=DEVICE, dtype=torch.float32).to(dtype)
    return wide[..., : shape[-1]]


def by_torch(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(ops, "kernels", None)
        return call()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    loose = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), atol=loose, rtol=loose)


def test_rms_norm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = randn(7, WIDTH, dtype=dtype, pad=8), randn(WIDTH, dtype=dtype)

    def call() -> tuple[Tensor, Tensor]:
        out = torch.full((7, WIDTH + 16), float("nan"), device=DEVICE, dtype=dtype)[:, :WIDTH]
        return out, ops.rms_norm(x, w, 1e-5, out)

    for ours, theirs in zip(call(), by_torch(monkeypatch, call), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("with_skip", [True, False])
def test_rms_norm_backward(dtype: torch.dtype, with_skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, dy = randn(5, WIDTH, dtype=dtype), randn(WIDTH, dtype=dtype), randn(5, WIDTH, dtype=dtype, pad=8)
    skip = randn(5, WIDTH, dtype=dtype, pad=24) if with_skip else None
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + 1e-5)

    def call() -> Tensor:
        return ops.rms_norm_backward(dy, x, w, rstd, skip, torch.full_like(x, float("nan")))

    assert_close(call(), by_torch(monkeypatch, call))
    leaf = x.float().requires_grad_()
    (leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float()).backward(dy.float())
    expected = leaf.grad + skip.float() if skip is not None else leaf.grad
    assert_close(call(), expected.to(dtype))


def stream() -> tuple[Angles, dict[str, Any]]:
    groups = [Group([1] * 4, ([2] * 3, [3] * 6)), Group([1] * 2, ([2], [3] * 2, [4] * 3))]
    batch = pack(groups)
    angle = batch["pos"][:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01, 0.002])[None]
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return Angles(angle.cos().to(DEVICE), angle.sin().to(DEVICE)), moved


@pytest.mark.parametrize("inverse", [False, True])
def test_rotate(dtype: torch.dtype, inverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    angles, batch = stream()
    src = randn(len(batch["ids"]), 3 * 10, dtype=dtype, pad=40)

    def call() -> Tensor:
        out = torch.zeros(len(src), 50, device=DEVICE, dtype=dtype)
        ops.rotate(src, out, angles, 3, inverse)
        return out

    assert_close(call(), by_torch(monkeypatch, call))
    assert not call()[:, 30:].any()


def test_gather_and_fold_of_keys_and_values(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    angles, batch = stream()
    kv = randn(len(batch["ids"]), 2 * 3 * 10, dtype=dtype, pad=16)

    def gather() -> Tensor:
        return ops.gather_kv(kv, batch["kv_source"], angles, 3)

    rows = gather()
    assert_close(rows, by_torch(monkeypatch, gather))
    dk, dv = (randn(len(rows), 3, 10, dtype=dtype) for _ in range(2))

    def fold() -> Tensor:
        out = torch.full((len(kv), 60 + 8), float("nan"), device=DEVICE, dtype=dtype)[:, :60]
        ops.fold_kv(dk, dv, batch["slots"], angles, out)
        return out

    assert_close(fold(), by_torch(monkeypatch, fold))
    # The fold is the transpose of the gather: <gather(kv), d> = <kv, fold(d)>.
    grads = torch.cat([dk.flatten(1), dv.flatten(1)], dim=1)
    left, right = (rows.double() * grads.double()).sum(), (kv.double() * fold().double()).sum()
    torch.testing.assert_close(left, right, rtol=2e-2, atol=0.5)


def test_swiglu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = randn(4, 2 * WIDTH, dtype=dtype)

    def call() -> Tensor:
        out = torch.full((4, WIDTH + 8), float("nan"), device=DEVICE, dtype=dtype)[:, :WIDTH]
        ops.swiglu(gate_up, out)
        return out

    assert_close(call(), by_torch(monkeypatch, call))


def test_swiglu_backward(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, given = randn(4, 2 * WIDTH, dtype=dtype), randn(4, WIDTH, dtype=dtype, pad=8)

    def call() -> tuple[Tensor, Tensor]:
        grad, out = given.clone(), torch.full((4, 2 * WIDTH + 8), float("nan"), device=DEVICE, dtype=dtype)
        ops.swiglu_backward(gate_up, grad, out[:, : 2 * WIDTH])
        return grad, out[:, : 2 * WIDTH]

    for ours, theirs in zip(call(), by_torch(monkeypatch, call), strict=True):
        assert_close(ours, theirs)
    leaf = gate_up.float().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up).backward(given.float())
    assert_close(call()[1], leaf.grad.to(dtype))


@pytest.mark.parametrize("vocabulary", [97, 2048, 5000])
def test_score_logits(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, vocabulary, device=DEVICE) * 8
    logits[2, 5:] = -1e4  # A row whose mass lies in one place.
    target = torch.tensor([0, 5, 3, vocabulary - 1, 1, 0], device=DEVICE)
    target[4] = logits[4].argmax()

    def call() -> tuple[Any, Tensor]:
        grad = torch.full_like(logits, float("nan"))
        return ops.score_logits(logits, target, grad), grad

    (ours, our_grad), (theirs, their_grad) = call(), by_torch(monkeypatch, call)
    for name in ("logps", "entropy", "mean"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-4, rtol=1e-5)
    assert torch.equal(ours.top1, theirs.top1)
    torch.testing.assert_close(our_grad, their_grad, atol=1e-5, rtol=1e-5)


def test_scaled_rows_are_dequantised(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-127, 128, (5, 70), device=DEVICE, dtype=torch.int8)
    weight = RowScaled(codes, torch.rand(5, device=DEVICE))
    out = torch.full((5, 90), float("nan"), device=DEVICE, dtype=dtype)
    weight.dequantise(out[:, :70])
    assert_close(out[:, :70].contiguous(), (codes.float() * weight.scale[:, None]).to(dtype))
    assert out[:, 70:].isnan().all()


@pytest.mark.skipif(not GPU, reason="bitsandbytes quantises on a GPU")
@pytest.mark.parametrize("nested", [True, False])
def test_nf4_is_dequantised_as_bitsandbytes_does(dtype: torch.dtype, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    weight = torch.randn(96, 320, device=DEVICE, dtype=dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    out = torch.full((96, 336), float("nan"), device=DEVICE, dtype=dtype)
    Nf4(packed, state, (96, 320)).dequantise(out[:, :320])
    assert torch.equal(out[:, :320], functional.dequantize_4bit(packed, state))
    assert out[:, 320:].isnan().all()
