"""Mixers that carry a state, on packed batches: scores and every gradient are those of rows computed one by one."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_assets.planning import delta_nets
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.fused.decoder import attach_fused
from dpo_assets.training.engines.recurrent import convolution, delta_net, mixers
from dpo_assets.training.engines.recurrent.segments import Segments
from dpo_assets.training.models.experts import serve_experts
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets.training.scoring.proof import NotExactError, assert_exact
from dpo_assets_tests.training.row_by_row import assert_equal, packed, row_by_row, tiny_policy
from dpo_assets_tests.training.tiny_models import OTHER_PAIR, PAIR, SHORT_PAIR

# Longer than a chunk of the delta rule on both sides, with an answer of one token.
LONG_PAIR = Group([3 + n % 60 for n in range(70)], ([5], [3 + n * 7 % 60 for n in range(50)]))
GROUPS = [PAIR, OTHER_PAIR, SHORT_PAIR, LONG_PAIR]
ANSWERS = [Group(group.prompt, group.completions[1:]) for group in GROUPS]
# Mamba's output projection takes no adapter (`planning.targets.OUTPUT_UNCALLED`).
HYBRIDS: dict[str, Any] = {
    "qwen3_5_text": "all-linear",
    "qwen3_next": "all-linear",
    "qwen3_5_moe_text": "all-linear",
    "lfm2": "all-linear",
    "falcon_h1": ["q_proj", "v_proj", "in_proj", "up_proj"],
    "granitemoehybrid": ["q_proj", "v_proj", "in_proj"],
}
SHARING = {"qwen3_5_text": "linear_attn.in_proj_qkv", "qwen3_next": "linear_attn.in_proj_qkvz", "lfm2": "conv.in_proj"}


def weights(groups: list[Group]) -> Tensor:
    rows = sum(len(group.completions) for group in groups)
    return torch.randn(rows, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("groups", [GROUPS, ANSWERS], ids=["pairs", "answers alone"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_is_scored_and_differentiated_as_it_is_row_by_row(name: str, groups: list[Group]) -> None:
    policy = tiny_policy(name, targets=HYBRIDS[name])
    assert_equal(packed(policy, groups, weights(groups)), row_by_row(policy, groups, weights(groups)))


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_state_that_crosses_rows_gives_other_scores_and_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_assets.training.engines.transformers.serve_packed", lambda lm: None)
    policy = tiny_policy(name, targets=HYBRIDS[name])
    with torch.no_grad():
        scores, _ = score_groups(policy, GROUPS, budget=10_000)
    theirs, _ = row_by_row(policy, GROUPS, weights(GROUPS))
    assert float((torch.tensor(scores) - theirs).abs().max()) > 0.02
    # Not of PAIR: its first answer repeats the end of its prompt, so a convolution sees no difference.
    with pytest.raises(NotExactError, match="row by row"):
        assert_exact(policy, OTHER_PAIR)


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_layers_that_are_recomputed_are_given_their_batch_again(name: str) -> None:
    policy = tiny_policy(name, targets=HYBRIDS[name])
    plain = packed(policy, GROUPS, weights(GROUPS))
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    assert_equal(packed(policy, GROUPS, weights(GROUPS)), plain)


@pytest.mark.parametrize("name", SHARING)
def test_a_shared_prompt_is_projected_and_scanned_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(name)
    projected, convolved = [], []  # type: list[int], list[int]
    for path, module in causal_lm(policy).named_modules():
        if path.endswith(SHARING[name]):
            module.register_forward_hook(lambda module, args, out: projected.append(args[0].flatten(0, -2).shape[0]))
    own = delta_net.chunk_gated_delta_rule()

    def counted(query: Tensor, *args: Any, g: Tensor, **kwargs: Any) -> Any:
        convolved.append(int((g != 0).any(dim=-1).sum()))
        return own(query, *args, g=g, **kwargs)

    monkeypatch.setattr(delta_net, "chunk_gated_delta_rule", lambda: counted)
    score_groups(policy, GROUPS, budget=10_000)
    tokens = sum(group.tokens for group in GROUPS)
    assert projected == [tokens]
    if name != "lfm2":
        prompts = sum(len(group.prompt) for group in GROUPS)
        assert convolved == [prompts, tokens - prompts]


@pytest.mark.parametrize("recomputed", [0, 2], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "qwen3_5_moe_text"])
def test_fused_layers_compute_delta_nets_and_experts(name: str, recomputed: int) -> None:
    policy = tiny_policy(name)
    theirs = row_by_row(policy, GROUPS, weights(GROUPS))
    serve_experts(causal_lm(policy))
    assert attach_fused(policy, torch.float32, recomputed) == ""
    assert_equal(packed(policy, GROUPS, weights(GROUPS)), theirs)


def test_mambas_fused_kernel_does_not_pass_by_the_adapter_of_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training it takes the projection's weight. A stand-in, because mamba-ssm runs on a GPU alone."""
    taken: list[Any] = []
    kernel = "transformers.models.granitemoehybrid.modeling_granitemoehybrid.mamba2_split_conv1d_scan_combined"
    monkeypatch.setattr(kernel, lambda x, *args, **kwargs: taken.append(x))
    policy = tiny_policy("granitemoehybrid", targets=["out_proj"]).train()
    _, gradients = packed(policy, GROUPS, weights(GROUPS))
    assert not taken
    assert all(gradient.any() for gradient in gradients.values())
    assert all(module.training for module in policy.modules())


def test_the_models_own_forward_stays_as_it_is_outside_of_packed_batches() -> None:
    policy = tiny_policy("qwen3_5_text")
    ids = torch.tensor([[*PAIR.prompt, *PAIR.completions[0]]])
    with torch.no_grad():
        before = causal_lm(tiny_policy("qwen3_5_text"))(input_ids=ids).logits
        score_groups(policy, GROUPS, budget=10_000)
        after = causal_lm(policy)(input_ids=ids).logits
    assert torch.equal(before, after)


def test_a_mixer_is_prepared_once_however_often_an_engine_is_made() -> None:
    policy = tiny_policy("qwen3_5_text")
    mixer = next(module for module in policy.modules() if mixers.is_recurrent(module))
    prepared = mixer.forward
    mixers.serve_packed(causal_lm(policy))
    assert mixer.forward is prepared


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next"])
def test_flas_kernels_are_given_what_they_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of fla-core 0.6.0, in PyTorch: its kernels run on a GPU alone."""
    policy = tiny_policy(name)
    theirs = row_by_row(policy, GROUPS, weights(GROUPS))
    monkeypatch.setattr(delta_net, "fla_delta_rule", lambda device: _delta_rule_as_in_fla)
    monkeypatch.setattr(delta_net, "fla_gated_norm", lambda device: _gated_norm_as_in_fla)
    monkeypatch.setattr(convolution, "fla_convolution", lambda device: _convolution_as_in_fla)
    assert_equal(packed(policy, GROUPS, weights(GROUPS)), theirs)


def _delta_rule_as_in_fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, *,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor, cu_seqlens_cpu: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """[1, T, heads, dim] of sequences side by side; states [n, value heads, key dim, value dim] in fp32."""
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens_cpu.device.type == "cpu"
    shared = v.shape[2] // q.shape[2]
    outs, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens_cpu.tolist())):
        part = [x[:, start:end] for x in (q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2), v)]
        out, state = delta_net.chunk_gated_delta_rule()(
            *part, g=g[:, start:end], beta=beta[:, start:end], output_final_state=True,
            initial_state=None if initial_state is None else initial_state[n : n + 1],
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )  # fmt: skip
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), torch.cat(states) if output_final_state else None


def _convolution_as_in_fla(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> tuple[Tensor, None]:
    """[1, T, channels] with weights [channels, width]."""
    padded = torch.nn.functional.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    out = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    return (torch.nn.functional.silu(out) if activation else out), None


def _gated_norm_as_in_fla(x: Tensor, g: Tensor, weight: Tensor, bias: None, *, eps: float) -> Tensor:
    assert x.shape == g.shape
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps) * torch.nn.functional.silu(g)


lengths = st.integers(1, 6)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=3)), min_size=1, max_size=4),
    lead=st.integers(0, 4),
)
def test_every_token_stands_behind_those_before_it_in_its_row(groups: list[tuple[int, list[int]]], lead: int) -> None:
    batch = pack([Group(range(prompt), tuple(range(n) for n in answers)) for prompt, answers in groups])
    segments = Segments.of(batch, lead)
    stream = torch.arange(1, len(batch.ids) + 1)
    led, own = segments.led(stream).tolist(), segments.own(stream).tolist()
    rows = _rows(groups)
    for place in np.flatnonzero(own):
        assert own[place] == led[place]
        token = led[place] - 1
        before = next(row[: row.index(token)] for row in rows if token in row)
        wanted = [0] * lead + [t + 1 for t in before]
        assert led[place - lead : place] == wanted[len(wanted) - lead :]
    assert segments.streamed(segments.led(stream)).tolist() == stream.tolist()
    assert sorted(filter(None, own)) == stream.tolist()
    starts = [start for stage in segments.stages for start in stage.starts_cpu.tolist()[:-1]]
    assert [stage.places - lead * stage.shape[0] for stage in segments.stages] == _stage_sizes(groups)
    assert not lead or len(starts) * lead == own.count(0)


def test_the_tables_of_a_batch_are_made_once_and_go_with_it() -> None:
    """Every layer asks for them; kept longer than their batch, they would be memory that nothing frees."""
    batch = pack(GROUPS)
    made = weakref.ref(Segments.of(batch, 3))
    assert Segments.of(batch, 3) is made()
    assert Segments.of(batch, 2) is not made()
    del batch
    gc.collect()
    assert made() is None


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=3)), min_size=1, max_size=4),
    lead=st.integers(0, 4),
)
def test_gradients_of_copies_come_home(groups: list[tuple[int, list[int]]], lead: int) -> None:
    """<copy x, y> = <x, back y> for every table, which holds for the gradient of a linear map and for nothing else."""
    batch = pack([Group(range(prompt), tuple(range(n) for n in answers)) for prompt, answers in groups])
    segments = Segments.of(batch, lead)
    generator = torch.Generator().manual_seed(0)
    sizes = [len(batch.ids), len(batch.ids), len(segments.led.there.index)]
    tables = [segments.led, segments.own, segments.streamed]
    for stage in segments.stages:
        tables += [stage.padded, stage.padded.undone]
        sizes += [stage.places, int(np.prod(stage.shape))]
    for table, size in zip(tables, sizes, strict=True):
        x = torch.randn(size, 2, generator=generator, dtype=torch.double)
        y = torch.randn(len(table.there.index), 2, generator=generator, dtype=torch.double)
        assert float((table.there(x) * y).sum() - (x * table.back(y)).sum()) == pytest.approx(0, abs=1e-9)


def _rows(groups: list[tuple[int, list[int]]]) -> list[list[int]]:
    rows, base = [], 0
    for prompt, answers in groups:
        start = base + prompt
        for n in answers:
            rows.append([*range(base, base + prompt), *range(start, start + n)])
            start += n
        base = start
    return rows


def _stage_sizes(groups: list[tuple[int, list[int]]]) -> list[int]:
    prompts = sum(prompt for prompt, _ in groups)
    answers = sum(sum(lengths) for _, lengths in groups)
    return [prompts + answers] if all(len(lengths) == 1 for _, lengths in groups) else [prompts, answers]


@pytest.mark.parametrize(
    ("triton", "capability", "tilelang", "wrong"),
    [
        ("3.6.0", (9, 0), False, True), ("3.4.0", (9, 0), False, True), ("3.7.0", (9, 0), False, True),
        ("3.7.1", (9, 0), False, False), ("3.3.1", (9, 0), False, False), ("3.6.0", (8, 0), False, False),
        ("3.6.0", (10, 0), False, False), ("3.6.0", (9, 0), True, False),
    ],
)  # fmt: skip
def test_flas_gradient_is_not_taken_where_triton_compiles_it_wrong(
    triton: str, capability: tuple[int, int], tilelang: bool, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_nets.importlib.metadata, "version", lambda package: triton)
    monkeypatch.setattr(delta_nets.importlib.util, "find_spec", lambda name: object() if tilelang else None)
    said = delta_nets.why_wrong_gradient(capability)
    assert bool(said) == wrong
    assert not wrong or f"Triton {triton}" in said
