"""The elementwise operations of fused layers against autograd of what they mean, written plainly.

Each runs in PyTorch, and in Triton: on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_assets.training.batches.batch import PackedBatch
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.fused import ops
from dpo_assets.training.engines.fused.ops import Activation, Angles, HeadTransform, backend, heads
from dpo_assets.training.engines.fused.quantised import Nf4, RowScaled

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEEDS_TRITON = "needs Triton with a GPU, or TRITON_INTERPRET=1 with Triton installed"
WIDTH, DTYPES = 96, [torch.bfloat16, torch.float16] if GPU else [torch.float32]


@pytest.fixture(params=["torch", "triton"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes the operation, with so few values a program that a few heads take several."""
    monkeypatch.setattr(heads, "TILE", 32)
    if request.param == "torch":
        monkeypatch.setattr(backend, "kernels", None)
    elif ops.kernels is None or not (GPU or ops.INTERPRETED):
        pytest.skip(NEEDS_TRITON)
    return str(request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(1)
    value: torch.dtype = request.param
    return value


def randn(*shape: int, dtype: torch.dtype, pad: int = 0) -> Tensor:
    """Random values; with `pad` a column slice of a wider matrix."""
    wide = torch.randn(*shape[:-1], shape[-1] + pad, device=DEVICE, dtype=torch.float32).to(dtype)
    return wide[..., : shape[-1]]


def leaf_of(x: Tensor) -> Tensor:
    """x in fp32, to be differentiated."""
    return x.float().clone().requires_grad_()


def unwritten(rows: int, width: int, dtype: torch.dtype, pad: int = 8) -> tuple[Tensor, Tensor]:
    """A matrix without values, and the column slice of it that an operation is to fill."""
    wide = torch.full((rows, width + pad), float("nan"), device=DEVICE, dtype=dtype)
    return wide, wide[:, :width]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    loose = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), atol=loose, rtol=loose)


# ---- norms


@pytest.mark.parametrize("exact_weight", [False, True])
def test_rms_norm(dtype: torch.dtype, exact_weight: bool) -> None:
    x, w = randn(7, WIDTH, dtype=dtype, pad=8), randn(WIDTH, dtype=torch.float32 if exact_weight else dtype)
    wide, out = unwritten(7, WIDTH, dtype)
    rstd = ops.rms_norm(x, w, 1e-5, out)
    assert_close(out, F.rms_norm(x.float(), (WIDTH,), w.float(), 1e-5))
    torch.testing.assert_close(rstd, torch.rsqrt(x.float().pow(2).mean(-1) + 1e-5))
    assert wide[:, WIDTH:].isnan().all()


@pytest.mark.parametrize("with_skip", [True, False])
def test_rms_norm_backward(dtype: torch.dtype, with_skip: bool) -> None:
    x, w, dy = randn(5, WIDTH, dtype=dtype), randn(WIDTH, dtype=dtype), randn(5, WIDTH, dtype=dtype, pad=8)
    skip = randn(5, WIDTH, dtype=dtype, pad=24) if with_skip else None
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + 1e-5)
    leaf = leaf_of(x)
    F.rms_norm(leaf, (WIDTH,), w.float(), 1e-5).backward(dy.float())
    assert leaf.grad is not None
    wide, out = unwritten(5, WIDTH, dtype)
    ops.rms_norm_backward(dy, x, w, rstd, skip, out)
    assert_close(out, leaf.grad if skip is None else leaf.grad + skip.float())
    assert wide[:, WIDTH:].isnan().all()


def test_a_norm_after_a_mixer_is_added_to_the_residual_stream_and_differentiated(dtype: torch.dtype) -> None:
    x, y, d = (randn(5, WIDTH, dtype=dtype, pad=pad) for pad in (8, 0, 16))
    w = randn(WIDTH, dtype=torch.float32)
    leaf = leaf_of(y)
    expected = x.float() + F.rms_norm(leaf, (WIDTH,), w, 1e-6)
    expected.backward(d.float())
    assert leaf.grad is not None
    _, out = unwritten(5, WIDTH, dtype)
    rstd = ops.add_normed(x, y, w, 1e-6, out)
    assert_close(out, expected.detach())
    assert_close(ops.rms_norm_backward(d, y, w, rstd, None, torch.full_like(y, float("nan"))), leaf.grad)
    ops.add_normed(x, y, w, 1e-6, x)  # In place on the stream.
    assert torch.equal(x, out)


# ---- heads of queries and keys

TOKENS = [Group([1] * 4, ([2] * 3, [3] * 6)), Group([1] * 2, ([2], [3] * 2, [4] * 3))]
DIM = 10
HEADS = 3


def stream() -> PackedBatch:
    return pack(TOKENS).to(DEVICE)


def angles(rotated: int, scale: float = 1.0) -> Angles:
    angle = stream().positions[:, None] * (0.3 ** torch.arange(rotated // 2, device=DEVICE))[None]
    return Angles(angle.cos() * scale, angle.sin() * scale)


def weight(*shape: int) -> Tensor:
    return torch.linspace(0.4, 1.7, torch.Size(shape).numel(), device=DEVICE)


def growth() -> Tensor:
    return 1 + 0.1 * stream().positions.float()


def transforms() -> dict[str, HeadTransform]:
    plain = HeadTransform(HEADS, DIM, eps=1e-5)
    rotated, per_head, whole = angles(DIM), weight(DIM), weight(HEADS * DIM)
    return {
        "llama": replace(plain, angles=rotated),
        "partial": replace(plain, angles=angles(6)),
        "partial neighbours": replace(plain, angles=angles(4), neighbours=True),
        "neighbours": replace(plain, angles=rotated, neighbours=True),
        "scaled table": replace(plain, angles=angles(DIM, 1.3)),
        "query growth, partial": replace(plain, angles=angles(6), factor=growth()),
        "neither": plain,
        "norm alone": replace(plain, norm=per_head),
        "qwen3": replace(plain, angles=rotated, norm=per_head),
        "qwen3.5": replace(plain, angles=angles(4), norm=per_head),
        "weights of each head": replace(plain, angles=rotated, norm=whole),
        "olmo2": replace(plain, angles=rotated, norm=whole, over_projection=True),
        "hunyuan": replace(plain, angles=rotated, norm=per_head, after_rotation=True),
        "after a scaled, partial rotation": replace(plain, angles=angles(6, 1.3), norm=per_head, after_rotation=True),
        "phi4, columns in runs of 16": replace(plain, heads=2, dim=128, angles=angles(96), norm=weight(128)),
        "all": replace(
            plain, angles=angles(4, 1.3), neighbours=True, norm=whole, over_projection=True, factor=growth()
        ),
    }


NAMES = list(transforms())


def plainly(x: Tensor, t: HeadTransform) -> Tensor:
    """x [T, heads, dim] transformed: PyTorch's RMS norm, and rotation as a product of complex numbers."""

    def normed(x: Tensor) -> Tensor:
        if t.norm is None:
            return x
        if t.over_projection:
            return F.rms_norm(x.flatten(1), (t.heads * t.dim,), t.norm, t.eps).view_as(x)
        return F.rms_norm(x, (t.dim,), None, t.eps) * (t.norm if len(t.norm) == t.dim else t.norm.view(t.heads, t.dim))

    def rotated(x: Tensor) -> Tensor:
        if t.angles is None:
            return x
        turn, half = torch.complex(t.angles.cos, t.angles.sin)[:, None], t.angles.cos.shape[1]
        part, rest = x[..., : 2 * half], x[..., 2 * half :]
        pairs = part.unflatten(-1, (half, 2) if t.neighbours else (2, half))
        pairs = pairs if t.neighbours else pairs.transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return torch.cat([(turned if t.neighbours else turned.transpose(-1, -2)).flatten(-2), rest], dim=-1)

    y = normed(rotated(x)) if t.after_rotation else rotated(normed(x))
    return y if t.factor is None else y * t.factor[:, None, None]


@pytest.mark.parametrize("gap", [0, 7], ids=["side by side", "each beside its gate"])
@pytest.mark.parametrize("name", NAMES)
def test_heads_are_transformed_and_differentiated(dtype: torch.dtype, name: str, gap: int) -> None:
    t = transforms()[name]
    tokens, stride = len(stream().ids), t.dim + gap
    src, d = randn(tokens, t.heads * stride, dtype=dtype, pad=16), randn(tokens, t.heads, t.dim, dtype=dtype)
    leaf = src.float().view(tokens, t.heads, stride)[..., : t.dim].clone().requires_grad_()
    expected = plainly(leaf, t)
    expected.backward(d.float())
    assert leaf.grad is not None

    wide, out = unwritten(tokens, t.width, dtype)
    ops.transform(src, out, t, stride if gap else 0)
    assert_close(out, expected.detach().flatten(1))
    assert wide[:, t.width :].isnan().all()

    wide, out = unwritten(tokens, t.heads * stride, dtype)
    ops.transform_backward(d, src, out, t, stride if gap else 0)
    by_head = out.unflatten(1, (t.heads, stride))
    assert_close(by_head[..., : t.dim], leaf.grad)
    assert wide[:, t.heads * stride :].isnan().all()
    assert by_head[..., t.dim :].isnan().all()


@pytest.mark.parametrize("name", [name for name, t in transforms().items() if t.in_place])
def test_heads_without_a_norm_are_transformed_in_place(dtype: torch.dtype, name: str) -> None:
    t = transforms()[name]
    x, d = (randn(len(stream().ids), t.width, dtype=dtype, pad=16) for _ in range(2))
    _, expected = unwritten(len(x), t.width, dtype)
    ops.transform(x, expected, t)
    _, expected_grad = unwritten(len(x), t.width, dtype)
    ops.transform_backward(d, x, expected_grad, t)
    ops.transform(x, x, t)
    assert torch.equal(x, expected)
    ops.transform_backward(d, x, d, t)  # Of overwritten heads, too.
    assert torch.equal(d, expected_grad)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_are_gathered_and_folded(dtype: torch.dtype, name: str) -> None:
    t, batch = transforms()[name], stream()
    kv = randn(len(batch.ids), 2 * t.width, dtype=dtype, pad=16)
    leaf = leaf_of(kv)
    keys = plainly(leaf[:, : t.width].unflatten(1, (t.heads, t.dim)), t).flatten(1)
    expected = torch.cat([keys, leaf[:, t.width :]], dim=1)[batch.unpadded.source]
    rows = ops.gather_kv(kv, batch.unpadded.source, t)
    assert_close(rows, expected.detach())

    dk, dv = (randn(len(rows), t.heads, t.dim, dtype=dtype, pad=pad) for pad in (0, 4))
    expected.backward(torch.cat([dk.flatten(1), dv.flatten(1)], dim=1).float())
    assert leaf.grad is not None
    wide, out = unwritten(len(kv), 2 * t.width, dtype)
    ops.fold_kv(dk, dv, kv, batch.unpadded.slots, t, out)
    assert_close(out, leaf.grad)
    assert wide[:, 2 * t.width :].isnan().all()


@pytest.mark.parametrize("form", ["torch"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"angles": Angles(torch.ones(4, 10)[:, ::2], torch.ones(4, 5))}, "contiguous"),
        ({"norm": torch.ones(20)[::2]}, "contiguous"),
        ({"angles": Angles(torch.ones(4, 6), torch.ones(4, 6))}, "12 columns"),
        ({"norm": torch.ones(20)}, "20 weights"),
        ({"dim": 9}, "heads of 9"),
    ],
)
def test_tables_that_a_kernel_would_misread_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadTransform(**({"heads": HEADS, "dim": DIM} | changes))


# ---- gates

MEANINGS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("activation", list(MEANINGS))
def test_a_gated_mlp_is_activated_and_differentiated(dtype: torch.dtype, activation: Activation) -> None:
    gate_up, d = randn(4, 2 * WIDTH, dtype=dtype) * 3, randn(4, WIDTH, dtype=dtype, pad=8)
    leaf = leaf_of(gate_up)
    gate, up = leaf.chunk(2, dim=-1)
    expected = MEANINGS[activation](gate) * up
    expected.backward(d.float())
    assert leaf.grad is not None

    wide, out = unwritten(4, WIDTH, dtype)
    ops.gated(gate_up, out, activation)
    assert_close(out, expected.detach())
    assert wide[:, WIDTH:].isnan().all()

    wide, out = unwritten(4, 2 * WIDTH, dtype)
    ops.gated_backward(gate_up, d, out, activation)
    assert_close(out, leaf.grad)
    assert_close(d, expected.detach())  # The down projection's input, which its LoRA asks for.
    assert wide[:, 2 * WIDTH :].isnan().all()


def test_an_activation_without_a_meaning_is_refused() -> None:
    gate_up, grad = torch.ones(1, 4, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="relu2"):
        ops.gated(gate_up, grad, "relu2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="relu2"):
        ops.gated_backward(gate_up, grad, gate_up, "relu2")  # type: ignore[arg-type]


@pytest.mark.parametrize("gap", [0, DIM], ids=["side by side", "each after its query"])
def test_a_gate_on_the_output_of_attention(dtype: torch.dtype, gap: int) -> None:
    stride, width = DIM + gap, HEADS * DIM
    attended, d = (randn(6, width, dtype=dtype, pad=pad) for pad in (0, 8))
    projected = randn(6, HEADS * stride, dtype=dtype, pad=16)
    leaves = [leaf_of(attended), leaf_of(projected)]
    gate = leaves[1].unflatten(1, (HEADS, stride))[..., gap:].flatten(1)
    expected = leaves[0] * gate.sigmoid()
    expected.backward(d.float())
    d_attended, d_projected = (leaf.grad for leaf in leaves)
    assert d_attended is not None
    assert d_projected is not None

    wide, out = unwritten(6, width, dtype)
    ops.output_gate(attended, projected[:, gap:], out, DIM, stride if gap else 0)
    assert_close(out, expected.detach())
    assert wide[:, width:].isnan().all()

    again, (wide, d_gate) = torch.full_like(attended, float("nan")), unwritten(6, HEADS * stride, dtype)
    ops.output_gate_backward(d, attended, projected[:, gap:], d_gate[:, gap:], again, DIM, stride if gap else 0)
    assert_close(d, d_attended)
    assert_close(again, expected.detach())
    by_head = d_gate.unflatten(1, (HEADS, stride))
    assert_close(by_head[..., gap:], d_projected.unflatten(1, (HEADS, stride))[..., gap:])
    assert by_head[..., :gap].isnan().all()
    assert wide[:, HEADS * stride :].isnan().all()


# ---- scores


@pytest.mark.parametrize("vocabulary", [97, 2048, 5000])
def test_score_logits(vocabulary: int) -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, vocabulary, device=DEVICE) * 8
    logits[2, 5:] = -1e4  # A row whose mass lies in one place.
    target = torch.tensor([0, 5, 3, vocabulary - 1, 1, 0], device=DEVICE)
    target[4] = logits[4].argmax()
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    wanted = logp.gather(1, target[:, None])[:, 0]
    wanted.sum().backward()

    grad = torch.full_like(logits, float("nan"))
    scores = ops.score_logits(logits, target, grad)
    expected = {"logps": wanted.detach(), "entropy": torch.distributions.Categorical(logits=logits).entropy()}
    expected["mean"] = logits.mean(-1)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(scores, name), value, atol=2e-4, rtol=1e-5)
    assert torch.equal(scores.top1, logits.argmax(-1) == target)
    torch.testing.assert_close(grad, leaf.grad, atol=1e-5, rtol=1e-5)


# ---- weights in fewer bits


def test_scaled_rows_are_dequantised(dtype: torch.dtype) -> None:
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
