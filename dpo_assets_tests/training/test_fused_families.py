"""Each family on fused layers against its own eager forward, row by row: hidden states, scores, every LoRA gradient.

Models are tiny, random and in fp32; windows are shorter than rows; no norm, bias, sink or LoRA factor is left at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_assets.planning.activations import kept_bytes, recomputed_bytes
from dpo_assets.planning.decoder import Attention, Decoder, Layer, Mlp, QueryGrowth, Rope
from dpo_assets.planning.support import NO, supported
from dpo_assets.recipe import LoraSection
from dpo_assets.training.batches.packing import pack
from dpo_assets.training.engines.fused import weights
from dpo_assets.training.engines.fused.block import FrozenBlock, Norm, Residual
from dpo_assets.training.engines.fused.decoder import FusedDecoder, why_not_fused
from dpo_assets.training.engines.fused.differentiated import AutogradBlock
from dpo_assets.training.engines.fused.layer import FusedLayer
from dpo_assets.training.engines.fused.mlp import GatedCore
from dpo_assets.training.engines.fused.ops import HeadTransform
from dpo_assets.training.engines.fused.stream import Stream
from dpo_assets.training.engines.fused.weights import FrozenGroup, Member, Scratch
from dpo_assets.training.models.fp8 import quantise_layers
from dpo_assets.training.models.structure import causal_lm, description_of
from dpo_assets_tests.training.fused_parity import GROUPS, adapted, as_on_a_gpu, assert_same, fused, own
from dpo_assets_tests.training.tiny_models import tiny_model

# Qwen3.5 without its delta nets, whose layers have tests of their own.
WITH_ATTENTION_ONLY: dict[str, dict[str, Any]] = {"qwen3_5_text": {"layer_types": ["full_attention"] * 2}}
FAMILIES = (
    "llama", "mistral+window", "ministral3", "qwen2", "qwen3", "phi3", "phi3+window", "smollm3", "granite", "olmo2",
    "olmo3", "gemma2", "gemma3_text", "glm4", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "exaone4", "qwen3_moe",
    "mixtral", "gpt_oss", "gemma", "ministral", "glm", "olmoe", "granitemoe", "qwen2_moe", *WITH_ATTENTION_ONLY,
)  # fmt: skip
# With what differs between them: norms, residuals, projections.
KINDS = ("qwen3", "phi3", "olmo3", "gemma3_text", "granite", "glm4")


def of_family(family: str, targets: Any = "all-linear") -> Any:
    return adapted(tiny_model(family, **WITH_ATTENTION_ONLY.get(family, {})), targets)


def test_every_family_that_the_page_of_models_says_is_fused_is_held_here() -> None:
    """Hybrids' delta nets have tests of their own (test_recurrent.py)."""
    claimed = {row.family for row in supported() if row.engines["fused"] != NO and "state" not in row.prompt}
    assert claimed <= {name.partition("+")[0] for name in FAMILIES}


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_its_own_eager_forward(family: str, recomputed: int) -> None:
    """Of two layers the lower is recomputed, or none."""
    model = of_family(family)
    theirs = own(model)
    assert_same(fused(model, recomputed), theirs)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])  # No flash attention with a soft cap.
def test_a_family_equals_its_own_eager_forward_as_a_gpu_lays_it_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_family(family)
    theirs = own(model)
    with as_on_a_gpu(monkeypatch):
        assert_same(fused(model), theirs)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("part", ["first", "last"])
def test_an_adapter_on_some_linear_layers(family: str, part: str) -> None:
    description = description_of(tiny_model(family))
    assert description is not None
    layer = description.layers[0]
    assert isinstance(layer.mixer, Attention)
    assert isinstance(layer.mlp, Mlp)
    targets = [layer.mixer.projections[0]] if part == "first" else [layer.mixer.output, layer.mlp.projections[-1]]
    model = of_family(family, targets)
    theirs = own(model)
    assert_same(fused(model, recomputed=1), theirs)


@pytest.mark.parametrize("family", KINDS)
def test_a_family_on_codes_of_8_bits_equals_its_plain_forward(family: str) -> None:
    """Each of several forwards restores every matrix into one that all layers share."""
    base = tiny_model(family)
    quantise_layers(base, "cpu")
    model = adapted(base)
    theirs = own(model)
    assert_same(fused(model, recomputed=1), theirs)


@pytest.mark.parametrize("family", KINDS)
def test_a_family_in_16_bit_is_near_its_fp32(family: str) -> None:
    exact, half = own(of_family(family)), of_family(family)
    causal_lm(half).to(torch.bfloat16)
    for name, parameter in half.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    ours = fused(half, recomputed=1, dtype=torch.bfloat16)
    mine, theirs = (torch.cat([g.flatten() for _, g in sorted(outcome[2].items())]) for outcome in (ours, exact))
    assert all(g.dtype == torch.float32 for g in ours[2].values())
    assert float(torch.nn.functional.cosine_similarity(mine, theirs, dim=0)) > 0.99
    assert float(mine.norm() / theirs.norm()) == pytest.approx(1.0, abs=0.05)


# --- what a layer keeps -----------------------------------------------------------------------------------------------


def tensors(kept: Any) -> Iterator[Tensor]:
    """Every tensor in what a layer keeps; tables of positions belong to the stream."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, tuple):
        for value in kept:
            yield from tensors(value)
    elif is_dataclass(kept) and not isinstance(kept, HeadTransform):
        for field in fields(kept):
            yield from tensors(getattr(kept, field.name))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", [*KINDS, "llama", "qwen3_5_text"])
def test_a_layer_keeps_what_the_planner_counts(family: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(family, **WITH_ATTENTION_ONLY.get(family, {}))
    adapted(base, rank=8)
    description = description_of(base)
    assert description is not None
    engine = FusedDecoder(base, torch.float32, 2 * recomputed)
    engine.refresh()
    batch = pack(GROUPS)
    stream = engine.stream(batch)
    with as_on_a_gpu(monkeypatch):
        x = torch.randn(len(batch.ids), description.hidden).requires_grad_()
        kept = engine.layers[1](x, stream).grad_fn.kept  # type: ignore[union-attr]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(kept)}
    layer, lora = description.layers[1], LoraSection(rank=8)
    if recomputed:
        expected = recomputed_bytes(layer, description, "fused", 4) + 4 * lora.rank  # x A^T of the last product.
    else:
        expected = kept_bytes(layer, description, "fused", lora, 4)
    assert sum(found.values()) / len(x) == pytest.approx(expected, rel=0.02)


# --- every word of a description counts -------------------------------------------------------------------------------


def attention(change: Callable[[Attention], Attention]) -> Callable[[Decoder], Decoder]:
    def layer(old: Layer) -> Layer:
        assert isinstance(old.mixer, Attention)
        return replace(old, mixer=change(old.mixer))

    return lambda decoder: replace(decoder, layers=tuple(layer(old) for old in decoder.layers))


def rope(**changes: Any) -> Callable[[Decoder], Decoder]:
    return attention(lambda old: replace(old, rope=replace(old.rope, **changes) if old.rope else None))


def qk_norm(**changes: Any) -> Callable[[Decoder], Decoder]:
    return attention(lambda old: replace(old, qk_norm=replace(old.qk_norm, **changes) if old.qk_norm else None))


def norms(**changes: str) -> Callable[[Decoder], Decoder]:
    return lambda d: replace(d, layers=tuple(replace(old, norms=replace(old.norms, **changes)) for old in d.layers))


def activation(decoder: Decoder) -> Decoder:
    return replace(decoder, layers=tuple(replace(x, mlp=replace(x.mlp, activation="silu")) for x in decoder.layers))


WORDS: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "a window of one token more": ("mistral+window", attention(lambda a: replace(a, window=a.window + 1))),
    "a window of one token less": ("gemma3_text", attention(lambda a: replace(a, window=a.window and a.window - 1))),
    "no window": ("olmo3", attention(lambda a: replace(a, window=None))),
    "scale": ("granite", attention(lambda a: replace(a, scale=a.head_dim**-0.5))),
    "no soft cap": ("gemma2", attention(lambda a: replace(a, softcap=None))),
    "no sinks": ("gpt_oss", attention(lambda a: replace(a, sinks=False))),
    "no growth of queries": ("ministral3", attention(lambda a: replace(a, query_growth=None))),
    "another growth": ("ministral3", attention(lambda a: replace(a, query_growth=QueryGrowth(0.1, 16)))),
    "rotation everywhere": ("smollm3", attention(lambda a: replace(a, rope=Rope(a.head_dim)))),
    "rotation nowhere": ("smollm3", attention(lambda a: replace(a, rope=None))),
    "half of what is rotated": ("glm4", rope(dim=2)),
    "the other pairs": ("ernie4_5", rope(pairs="halves")),
    "the other table": ("gemma3_text", rope(table="full_attention")),
    "norms of queries before the rotation": ("hunyuan_v1_dense", qk_norm(after_rotation=False)),
    "norms of queries after the rotation": ("qwen3", qk_norm(after_rotation=True)),
    "no norms of queries": ("qwen3", attention(lambda a: replace(a, qk_norm=None))),
    "no norm before": ("llama", norms(before_mixer="")),
    "no norm after": ("olmo2", norms(after_mlp="")),
    "another norm": ("glm4", norms(after_mixer="post_mlp_layernorm")),
    "no norm offset": ("gemma3_text", lambda d: replace(d, norm_offset=0.0)),
    "no embedding scale": ("gemma3_text", lambda d: replace(d, embedding_scale=1.0)),
    "no residual scale": ("granite", lambda d: replace(d, residual_scale=1.0)),
    "another activation": ("gemma3_text", activation),
    "eps": ("qwen3", lambda d: replace(d, eps=0.1)),
}  # fmt: skip


@pytest.mark.parametrize(("family", "change"), WORDS.values(), ids=WORDS)
def test_a_wrong_word_in_a_description_shows_in_the_scores(family: str, change: Callable[[Decoder], Decoder]) -> None:
    """What the parity of a family rests on: its tiny model feels what its description says."""
    model = of_family(family)
    description = description_of(causal_lm(model))
    assert description is not None
    theirs = own(model)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(fused(model, description=change(description)), theirs)


# --- what is not served -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "nothing describes"),
        ("starcoder2", "take the mean away"),
        ("gemma4_text", "embeddings for each layer"),
    ],
)
def test_what_fused_layers_cannot_compute_is_named(name: str, reason: str) -> None:
    assert reason in why_not_fused(tiny_model(name))


def test_a_model_without_the_modules_of_its_description_is_named() -> None:
    model = tiny_model("qwen3")
    del model.get_decoder().layers[1].self_attn.k_norm
    assert why_not_fused(model) == "its layers have no self_attn.k_norm"


# --- blocks -----------------------------------------------------------------------------------------------------------


@dataclass
class Adapter:
    """As much of PEFT's layer as a frozen group reads."""

    lora_A: dict[str, nn.Linear]  # noqa: N815
    lora_B: dict[str, nn.Linear]  # noqa: N815
    active_adapters = ("default",)
    disable_adapters = False
    r = {"default": 2}  # noqa: RUF012
    scaling = {"default": 1.5}  # noqa: RUF012


def group(inputs: int, *outputs: int) -> FrozenGroup:
    members = []
    for width in outputs:
        adapter = Adapter({"default": nn.Linear(inputs, 2, bias=False)}, {"default": nn.Linear(2, width, bias=False)})
        members.append(Member(nn.Linear(inputs, width).requires_grad_(False), adapter))
    made = FrozenGroup(members, torch.float32, Scratch(torch.float32, torch.device("cpu")))
    for where, factor, scale in made.slots():
        where.copy_(factor.detach() * scale)
    return made


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("after", [None, Norm(torch.rand(8) + 0.5, 1e-6)], ids=["plain", "norm after"])
def test_a_block_by_autograd_equals_the_frozen_one(recompute: bool, after: Norm | None) -> None:
    """The same MLP both ways, in both places of a layer, over one pair of groups whose gradients add up."""
    torch.manual_seed(0)
    first, last = group(8, 12, 12), group(12, 8)
    residual = Residual(Norm(torch.rand(8) + 0.5, 1e-6), after, 1.0 if after else 0.5)

    def by_modules(x: Tensor, members: FrozenGroup) -> Tensor:
        parts = [m.linear(x) + m.scale * m.lora.lora_B["default"](m.lora.lora_A["default"](x)) for m in members.members]
        return torch.cat(parts, dim=-1)

    def function(x: Tensor, stream: Stream) -> Tensor:
        gate, up = by_modules(x, first).chunk(2, dim=-1)
        return by_modules(nn.functional.silu(gate) * up, last)

    frozen = FrozenBlock(first, GatedCore("silu"), last, residual)
    differentiated = AutogradBlock(
        function,
        residual,
        modules=[pair["default"] for m in (*first.members, *last.members) for pair in (m.lora.lora_A, m.lora.lora_B)],
    )
    stream = Stream({}, {}, {})
    x, dy = torch.randn(2, 5, 8)
    outcomes = []
    for mixer, mlp in ((frozen, frozen), (differentiated, frozen), (frozen, differentiated)):
        for parameter in mixer.trained:
            parameter.grad = None
        leaf = x.clone().requires_grad_()
        y = FusedLayer(mixer, mlp, recompute)(leaf, stream)
        y.backward(dy)
        with torch.no_grad():
            assert torch.equal(FusedLayer(mixer, mlp)(x, stream), y)
        assert leaf.grad is not None
        outcomes.append([y.detach(), leaf.grad, *(p.grad.clone() for p in mixer.trained if p.grad is not None)])
    assert len(outcomes[0]) == 2 + len(frozen.trained)
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Written:
    """A quantised weight that tells when it is dequantised."""

    weight: Tensor
    name: str
    told: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    def dequantise(self, out: Tensor) -> None:
        self.told.append(self.name)
        out.copy_(self.weight)


def test_a_recomputed_layer_dequantises_gate_and_up_once_in_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised groups of two blocks take turns in two matrices, and compute what plain ones do."""
    torch.manual_seed(0)
    plain = {name: group(8, *outputs) for name, outputs in (("qkv", (12, 12)), ("gate, up", (12, 12)))}
    plain |= {name: group(12, 8) for name in ("o", "down")}
    told: list[str] = []
    scratches = {
        "first": Scratch(torch.float32, torch.device("cpu")),
        "last": Scratch(torch.float32, torch.device("cpu")),
    }

    def quantised(name: str) -> FrozenGroup:
        of_it = plain[name]
        monkeypatch.setattr(
            weights, "quantised_weight", lambda linear: Written(linear.weight.detach().clone(), name, told)
        )
        made = FrozenGroup(of_it.members, torch.float32, scratches["last" if name in ("o", "down") else "first"])
        for where, factor, scale in made.slots():
            where.copy_(factor.detach() * scale)
        return made

    def layer(of: Callable[[str], FrozenGroup]) -> FusedLayer:
        mixer, mlp = (
            FrozenBlock(of(first), GatedCore("silu"), of(last), Residual(Norm(torch.ones(8), 1e-6)))
            for first, last in (("qkv", "o"), ("gate, up", "down"))
        )
        return FusedLayer(mixer, mlp, recompute=True)

    outcomes = []
    x, dy = torch.randn(2, 5, 8)
    for made in (layer(plain.__getitem__), layer(quantised)):
        trained = [*made.mixer.trained, *made.mlp.trained]
        for parameter in trained:
            parameter.grad = None
        leaf = x.clone().requires_grad_()
        y = made(leaf, Stream({}, {}, {}))
        forward, told[:] = list(dict.fromkeys(told)), []
        y.backward(dy)
        assert leaf.grad is not None
        outcomes.append([y.detach(), leaf.grad, *(p.grad.clone() for p in trained if p.grad is not None)])
    torch.testing.assert_close(outcomes[1], outcomes[0])
    assert len(outcomes[0]) == 2 + 6 * 2
    assert forward == ["qkv", "o", "gate, up", "down"]
    # A group of two tells twice.
    assert told == [*["qkv"] * 2, "o", *["gate, up"] * 2, "down", "o", *["qkv"] * 2]
