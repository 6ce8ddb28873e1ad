"""Memory and time of what is no Llama: experts, windows, norms after blocks, gates; and padding of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from dpo_assets.assets.dpo_plan import engines_table
from dpo_assets.planning.activations import kept_bytes, working_bytes
from dpo_assets.planning.cards import find_card
from dpo_assets.planning.decoder import Attention, Decoder, Experts, Mlp, Norms
from dpo_assets.planning.memory import GIB, Training, body_parameters, described_parameters, weights_bytes
from dpo_assets.planning.shape import Kernels, ModelShape
from dpo_assets.planning.sizes import find_model
from dpo_assets.planning.speed import Arithmetic, step_seconds
from dpo_assets.planning.targets import EXPERT_PARAMETERS
from dpo_assets.planning.work import Work
from dpo_assets.recipe import LoraSection
from dpo_assets_tests.planning.cases import H200, planned, shape_of
from dpo_assets_tests.planning.measured import LORA, SHAPES

H100 = find_card("h100")
STEP = Work(16, 1_892, 841.8, 172.1, 1_024)


EXPERTS = shape_of(
    model_type="qwen3_moe", vocab_size=151_936, hidden_size=2_048, intermediate_size=6_144, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    moe_intermediate_size=768, tie_word_embeddings=False,
)  # fmt: skip


def changed(shape: ModelShape, **changes: Any) -> Decoder:
    decoder = shape.described()
    layers = []
    for layer in decoder.layers:
        assert isinstance(layer.mixer, Attention)
        mixer = replace(layer.mixer, **{k: v for k, v in changes.items() if k in ("window", "gated")})
        layers.append(replace(layer, mixer=mixer, norms=changes.get("norms", layer.norms)))
    return replace(decoder, layers=tuple(layers))


# Experts


def test_experts_count_whole_in_memory_and_active_in_time() -> None:
    """Qwen3-30B-A3B: 30.5 billion parameters, 3.3 of them active for a token."""
    assert described_parameters(EXPERTS.described()) == pytest.approx(30.5e9, rel=0.01)
    arithmetic = Arithmetic.of(EXPERTS.described(), LORA)
    active = arithmetic.linear + arithmetic.experts + arithmetic.head
    assert active == pytest.approx(3.3e9 - 151_936 * 2_048, rel=0.05)
    assert weights_bytes(EXPERTS, "bf16") == pytest.approx(2 * 30.5e9, rel=0.01)


def test_experts_are_not_quantised_being_parameters() -> None:
    saved = weights_bytes(EXPERTS, "bf16") - weights_bytes(EXPERTS, "4bit")
    assert saved == pytest.approx(1.48 * body_parameters(EXPERTS), rel=0.01)
    assert weights_bytes(EXPERTS, "4bit") / GIB > 50


def test_weights_that_a_file_packs_two_to_a_byte_count_as_what_they_are_loaded_as() -> None:
    packed = EXPERTS.model_copy(update={"parameters": 16_000_000_000})
    assert weights_bytes(packed, "bf16") == weights_bytes(EXPERTS, "bf16")


@pytest.mark.parametrize("kernels", get_args(Kernels))
def test_more_active_experts_take_more_memory_and_more_time(kernels: Kernels) -> None:
    decoder = EXPERTS.described()
    layers = []
    for layer in decoder.layers:
        assert isinstance(layer.mlp, Experts)
        layers.append(replace(layer, mlp=replace(layer.mlp, active=16)))
    more = EXPERTS.model_copy(update={"decoder": replace(decoder, layers=tuple(layers))})
    few, many = (Training(shape, "bf16", kernels, LORA, "cuda") for shape in (EXPERTS, more))
    assert many.peak(4_096, 0) > few.peak(4_096, 0)
    # In one forward, which the launches do not hold up.
    assert many.seconds(STEP, 32_768, 0, H100) > few.seconds(STEP, 32_768, 0, H100)


ADAPTED = LoraSection(rank=16, target_parameters=list(EXPERT_PARAMETERS))


@pytest.mark.parametrize("kernels", ["fused", "transformers", "rows"])
def test_adapted_experts_count_the_weights_that_peft_makes_of_them(kernels: Kernels) -> None:
    """Qwen3-30B-A3B: 1.125 GiB in every layer that is not recomputed, 54 GiB in all, however small a forward is."""
    adapted = Training(EXPERTS, "bf16", kernels, ADAPTED, "cuda")
    one = 2 * 128 * 3 * 768 * 2_048 / GIB
    for recomputed in (0, 40, 48):
        assert adapted.parts(64, recomputed)["adapted experts"] == pytest.approx((48 - recomputed) * one)
    assert adapted.peak(64, 0) == pytest.approx(sum(adapted.parts(64, 0).values()))
    # Sums, product and gradient of the one layer that is differentiated.
    assert adapted.parts(64, 48)["working memory"] == pytest.approx(3 * one, rel=0.05)


def test_every_forward_reads_all_experts_and_adapted_ones_are_made_anew() -> None:
    """57 GB at 3.35 TB/s are 17 ms for each of two passes, whatever a forward holds."""
    adapted, frozen = (Training(EXPERTS, "bf16", "fused", lora, "cuda").arithmetic for lora in (ADAPTED, LORA))
    assert (frozen.routed, frozen.made, adapted.made) == (adapted.routed, 0, adapted.routed)
    assert frozen.routed == 48 * 128 * 3 * 768 * 2_048
    decoder, per_forward = EXPERTS.described(), 2 * 2 * frozen.routed / (H100.terabytes_per_s * 1e12)
    assert per_forward == pytest.approx(2 * 0.0173, rel=0.01)
    step = Work(64, 4_096, 4_096.0, 800.0, 4_096)
    read, unread = (
        step_seconds(decoder, arithmetic, "bf16", "fused", step, 8_192, 0, H100, rank=16)
        for arithmetic in (frozen, replace(frozen, routed=0.0))
    )
    assert read - unread == pytest.approx(32 * per_forward)
    assert Training(EXPERTS, "bf16", "fused", ADAPTED, "cuda").seconds(step, 4_096, 0, H100) > Training(
        EXPERTS, "bf16", "fused", LORA, "cuda"
    ).seconds(step, 4_096, 0, H100)


# Mixers with a state


def test_mamba_beside_attention_is_kept_and_its_scan_is_worked_with() -> None:
    """Falcon-H1-0.5B: PyTorch's scan makes chunk x heads x state values a token before it sums them."""
    shape = shape_of(
        model_type="falcon_h1", vocab_size=32_784, hidden_size=1_024, intermediate_size=2_048, num_hidden_layers=36,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, mamba_d_ssm=1_536, mamba_n_heads=24,
        mamba_d_state=128, mamba_n_groups=1, mamba_chunk_size=128,
    )  # fmt: skip
    decoder = shape.described()
    layer = decoder.layers[0]
    alone = replace(layer, beside=None)
    for kernels in ("transformers", "rows"):
        assert working_bytes(layer, decoder, kernels, LORA, 2) - working_bytes(alone, decoder, kernels, LORA, 2) >= (
            128 * 24 * 128 * 4
        )
        # Values, keys and queries in fp32 and what they make of one another.
        assert kept_bytes(layer, decoder, kernels, LORA, 2) > kept_bytes(alone, decoder, kernels, LORA, 2) + 4 * 3 * (
            1_536 + 24 * 128
        )


def test_delta_nets_by_pytorch_take_more_than_by_flash_linear_attention() -> None:
    shape = find_model("qwen3.5-9b").shape
    for kernels in ("fused", "transformers", "rows"):
        with_fla, without = (Training(shape, "bf16", kernels, LORA, "cuda", fla=fla) for fla in (True, False))
        assert without.peak(4_096, 8) > with_fla.peak(4_096, 8) + 0.5


# Layers


@pytest.mark.parametrize("kernels", get_args(Kernels))
def test_what_a_layer_does_more_it_keeps_more(kernels: Kernels) -> None:
    shape = SHAPES["8b"]
    gated = changed(shape, gated=True)
    sandwich = changed(shape, norms=Norms("a", "b", "c", "d"))

    def kept(decoder: Decoder) -> float:
        return kept_bytes(decoder.layers[0], decoder, kernels, LORA, 2)

    plain = kept(shape.described())
    assert kept(sandwich) > plain
    # Unsloth's own layers have no form of a gate, so that none is planned there.
    assert (kept(gated) > plain) is (kernels != "unsloth")


def test_a_window_takes_time_off_long_rows_and_none_off_rows_that_fit_into_it() -> None:
    full, windowed = SHAPES["8b"], SHAPES["8b"].model_copy(update={"decoder": changed(SHAPES["8b"], window=1_024)})
    for length, faster in ((1_024, False), (16_384, True)):
        step = Work(4, 2 * length, 1.6 * length, 0.2 * length, length)
        seconds = [
            Training(shape, "bf16", "fused", LORA, "cuda").seconds(step, 2 * length, 0, H100)
            for shape in (full, windowed)
        ]
        assert (seconds[1] < 0.95 * seconds[0]) is faster


def test_frozen_linear_layers_keep_less_in_every_engine() -> None:
    few = LoraSection(rank=16, target_modules=["q_proj", "v_proj"])
    shape = SHAPES["8b"].described()
    for kernels in get_args(Kernels):
        assert kept_bytes(shape.layers[0], shape, kernels, few, 2) < kept_bytes(
            shape.layers[0], shape, kernels, LORA, 2
        )


def test_an_mlp_without_a_gate_keeps_less() -> None:
    decoder = SHAPES["8b"].described()
    plain = decoder.layers[0]
    assert isinstance(plain.mlp, Mlp)
    other = replace(plain, mlp=replace(plain.mlp, gated=False, projections=("up_proj",)))
    assert kept_bytes(other, decoder, "rows", LORA, 2) < kept_bytes(plain, decoder, "rows", LORA, 2)


# Rows


@pytest.mark.parametrize(("pairs", "padded"), [(2, 1_609.5), (4, 1_872.8), (8, 1_978.0), (16, 2_048.0)])
def test_micro_batches_are_padded_to_their_longest_row(pairs: int, padded: float) -> None:
    """Tokens a pair of the benchmark's 48 pairs, in their order, with UltraFeedback's lengths cut at 1,024."""
    step = replace(STEP, trainer="trl", micro_batch=pairs)
    assert step.computed_tokens("transformers", step.classic_tokens(pairs)) / 16 == pytest.approx(padded, rel=0.04)


def test_sharing_the_prompt_is_what_packed_engines_compute_less() -> None:
    long_prompts = Work(16, 2_000, 1_200.0, 900.0, 1_024)
    shared = long_prompts.computed_tokens("transformers", 4_096)
    assert shared == 16 * 1_200
    assert long_prompts.computed_tokens("rows", 4_096) > 16 * (1_200 + 900)


# Shown


def test_the_plan_asset_shows_every_engine_side_by_side() -> None:
    shown = engines_table(planned(SHAPES["8b"], H200))
    lines = shown.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["fused", "unsloth", "transformers", "rows"]
    assert lines[2].rstrip(" |").endswith("taken")
    assert "not installed" in lines[3]
