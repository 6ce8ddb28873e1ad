"""What the proof of an engine sees: a window in 16 bit, an adapter that is new, a backward pass, noise in training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.granitemoehybrid import modeling_granitemoehybrid

from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.data import dpo_group, longest_group
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines import attention
from dpo_assets.training.engines.base import attach_engine, attached_engine
from dpo_assets.training.engines.fused.weights import FrozenGroup
from dpo_assets.training.engines.rotary import RotaryTables
from dpo_assets.training.engines.routers import RouterWatch
from dpo_assets.training.engines.rows import OwnLogitsEngine, RowsEngine
from dpo_assets.training.engines.transformers import TransformersEngine, engine_of, why_not_packed
from dpo_assets.training.models.fp8 import Fp8Linear, quantise_layers
from dpo_assets.training.models.loading import switch_off_dropout
from dpo_assets.training.scoring import generation, proof
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps
from dpo_assets.training.scoring.proof import (
    NoisyError,
    NotExactError,
    Settled,
    alike,
    assert_exact,
    assert_routers_heard,
    settle_engine,
)
from dpo_assets_tests.training.conftest import PlanMaker
from dpo_assets_tests.training.dense import summed_logps
from dpo_assets_tests.training.tiny_models import OTHER_PAIR, PAIR, SETTINGS, SHORT_PAIR, tiny_model

LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16, "factor": 8.0,
    },
}  # fmt: skip
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
CHANGING = pytest.mark.parametrize(("name", "rope"), [("phi3", LONGROPE), ("llama", DYNAMIC)])


@pytest.fixture
def plan(plan_for: PlanMaker) -> TrainingPlan:
    return plan_for()


def new_adapter(lm: Any) -> Any:
    return get_peft_model(lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def packed(lm: Any) -> Any:
    assert why_not_packed(lm) == ""
    attach_engine(lm, TransformersEngine(lm))
    return lm


def drawn(prompt: int, *answers: int) -> Group:
    draws = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (n,), generator=draws).tolist() for n in (prompt, *answers)]
    return Group(ids[0], tuple(ids[1:]))


# --- 16 bit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "blind"),
    [("mistral+window", "window"), ("gemma3_text", "window"), ("gemma2", "softcap"), ("gpt_oss", "sinks")],
)
def test_an_engine_that_leaves_a_part_of_attention_out_is_seen_in_16_bit(
    name: str, blind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a whole answer its differences have both signs, so a sum hides them."""
    model, group, kind = packed(tiny_model(name).to(torch.bfloat16)), drawn(40, 40, 30), attention.AttentionKind
    assert_exact(model, group)

    def without(*args: Any, **kwargs: Any) -> Any:
        made = kind(*args, **kwargs)
        return kind(**{field: getattr(made, field) for field in made.__dataclass_fields__} | {blind: None})

    monkeypatch.setattr(attention, "AttentionKind", without)
    with pytest.raises(NotExactError, match="apart a token"):
        assert_exact(model, group)


def test_a_window_that_a_model_leaves_to_its_mask_is_seen_in_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 28}
    monkeypatch.setitem(SETTINGS, "qwen2_moe", small | window | {"shared_expert_intermediate_size": 16})
    with pytest.raises(NotExactError):
        assert_exact(packed(tiny_model("qwen2_moe").to(torch.bfloat16)), drawn(40, 40, 30))


def test_a_deep_model_may_round_as_much_as_its_own_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, group = packed(tiny_model("llama", num_hidden_layers=12).to(torch.bfloat16)), drawn(40, 40, 30)
    monkeypatch.setattr(proof, "HALF_TOLERANCE", 1e-4)  # Below what any engine reaches in bf16.
    assert_exact(model, group)
    monkeypatch.setattr(proof, "ROUNDINGS", 0.1)
    with pytest.raises(NotExactError):
        assert_exact(model, group)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["fused", "transformers", "rows"])
def test_the_proof_leaves_a_new_adapter_its_gradients_and_the_random_state_as_they_were(
    kernels: str, plan: TrainingPlan
) -> None:
    model = new_adapter(tiny_model("llama"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    state, unstirred = torch.random.get_rng_state(), summed_logps(model, [PAIR])
    settled = settle_engine(model, plan.model_copy(update={"kernels": kernels}), PAIR, trains=True)
    assert (settled.kernels, settled.note) == (kernels, "")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.grad is None, name
    batch = pack([PAIR])  # By `score_tokens`, which does not renew the engine.
    scores = sequence_logps(score_tokens(model, batch), batch)
    assert scores.tolist() == pytest.approx(unstirred, abs=1e-4), "nor does the engine keep noise"


def test_an_engine_that_leaves_a_new_adapter_out_is_seen(plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its B is zero, so it has no effect yet."""
    monkeypatch.setattr(FrozenGroup, "slots", lambda self: [])
    settled = settle_engine(new_adapter(tiny_model("llama")), plan.model_copy(update={"kernels": "fused"}), PAIR)
    assert settled.kernels == "transformers"
    assert "by `fused`" in settled.note


class NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("no kernel for this gradient")


def test_an_engine_whose_backward_pass_fails_is_replaced_before_the_reference_is_scored(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TransformersEngine.hidden
    monkeypatch.setattr(TransformersEngine, "hidden", lambda *args: NoWayBack.apply(own(*args)))
    assert settle_engine(new_adapter(tiny_model("llama")), plan, PAIR).kernels == "transformers"
    settled = settle_engine(new_adapter(tiny_model("llama")), plan, PAIR, trains=True)
    assert settled.kernels == "rows"
    assert "no kernel for this gradient" in settled.note


def test_a_model_that_is_random_while_it_trains_is_refused_by_name(plan: TrainingPlan) -> None:
    model = new_adapter(tiny_model("mixtral", router_jitter_noise=0.3))
    with pytest.raises(NoisyError, match=r"MixtralForCausalLM gives two scores .* jitter"):
        settle_engine(model, plan, PAIR, trains=True)
    assert all(p.grad is None for p in model.parameters())


def test_memory_that_a_cpu_lacks_in_the_proof_says_nothing_about_the_engine(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its allocator raises a plain RuntimeError."""

    def lacking(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(TransformersEngine, "hidden", lacking)
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        settle_engine(tiny_model("llama"), plan, PAIR)
    assert not isinstance(raised.value, ConfigError)


# --- rotary tables that change with the longest row -------------------------------------------------------------------


def alone(name: str, rope: dict[str, Any], group: Group) -> list[float]:
    """Scores of each row by a model that has seen no other."""
    return [summed_logps(tiny_model(name, **rope), [Group(group.prompt, (answer,))])[0] for answer in group.completions]


@CHANGING
def test_rows_beside_longer_ones_keep_their_own_rotary_tables(name: str, rope: dict[str, Any]) -> None:
    """Rows of 18 and 30 tokens are past the length up to which the tables are fixed; those of 3 and 4 are not."""
    model = tiny_model(name, **rope)
    attach_engine(model, RowsEngine(model, 10_000))
    falling = Group(PAIR.prompt, PAIR.completions[::-1])  # The longer row first, which stretches a dynamic table.
    scores, _ = score_groups(model, [falling, SHORT_PAIR], 10_000)
    assert scores == pytest.approx(alone(name, rope, falling) + alone(name, rope, SHORT_PAIR), abs=1e-4)
    again, _ = score_groups(model, [SHORT_PAIR, falling], 10_000)
    assert again == pytest.approx(scores[2:] + scores[:2], abs=1e-4), "whatever was scored before"
    # The other rows' tables would be seen.
    beside = summed_logps(tiny_model(name, rope_parameters={"rope_theta": 10000.0}), [falling])
    assert scores[:2] != pytest.approx(beside, abs=1e-2)


@CHANGING
def test_rows_of_such_a_model_are_proven_also_where_a_pair_stands_on_both_sides(
    name: str, rope: dict[str, Any], plan: TrainingPlan
) -> None:
    model = tiny_model(name, **rope)
    rows = plan.model_copy(update={"kernels": "rows"})
    for answers in ((PAIR.completions[0][:4], PAIR.completions[1]), PAIR.completions[::-1]):
        settled = settle_engine(model, rows, Group(PAIR.prompt, answers))
        assert (settled.kernels, settled.note) == ("rows", "")


def test_prompts_whose_rotary_tables_change_on_the_way_are_answered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GENERATION_BATCH", 2)
    tables = RotaryTables.of(tiny_model("phi3", **LONGROPE))
    prompts = [[5] * n for n in (3, 4, 5, 20, 6, 13)]
    batches = list(generation.answered_together(prompts, 4, tables))
    assert [[len(prompt) for prompt in batch] for batch in batches] == [[3, 4], [5], [20], [6], [13]]
    assert [len(batch) for batch in generation.answered_together(prompts, 4, RotaryTables())] == [2, 2, 2]


# --- noise, mixers, routers, layers -----------------------------------------------------------------------------------

RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "router jitter": ("mixtral", {"router_jitter_noise": 0.3}),
    "a rate that is read from the config": ("falcon+alibi", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
    "layers left out": ("xglm", {"layerdrop": 0.5}),
    "rates called pdrop": ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
}


@pytest.mark.parametrize("what", RANDOM)
def test_nothing_random_is_left_in_training_where_an_adapter_has_no_dropout(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xglm = {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4, "max_position_embeddings": 128}
    monkeypatch.setitem(SETTINGS, "xglm", xglm)
    name, rates = RANDOM[what]
    model = tiny_model(name, **rates).train()
    attach_engine(model, OwnLogitsEngine(model, 10_000))
    batch = pack([PAIR])
    assert not torch.equal(*(score_tokens(model, batch).logps for _ in range(2)))
    switch_off_dropout(model)
    assert torch.equal(*(score_tokens(model, batch).logps for _ in range(2)))


@pytest.mark.parametrize("engine", [RowsEngine, OwnLogitsEngine, None])
def test_a_mamba_layers_output_adapter_is_trained_by_every_engine(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's kernel takes the weight of the output projection, past its adapter. It runs on a GPU alone; in its
    place is what Transformers computes without it, so that its call is seen."""
    lm = tiny_model("granitemoehybrid")
    model = get_peft_model(lm, LoraConfig(r=4, target_modules=["out_proj"], task_type="CAUSAL_LM"))
    own, calls = modeling_granitemoehybrid.mamba2_split_conv1d_scan_combined, []

    def seen(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["outproj_weight"])
        return own(*args, **kwargs)

    monkeypatch.setattr(modeling_granitemoehybrid, "mamba2_split_conv1d_scan_combined", seen)
    if engine is None:
        packed(lm)
    else:
        attach_engine(lm, engine(lm, 10_000))
    model.train()
    score_tokens(model, pack([PAIR])).logps.sum().backward()
    assert not calls
    outputs = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert outputs
    assert all(grad is not None and bool(grad.any()) for grad in outputs)


def test_an_engine_that_does_not_hear_routers_is_named_before_a_step() -> None:
    model = tiny_model("qwen3_moe")
    attach_engine(model, RowsEngine(model, 10_000))
    with pytest.raises(ConfigError, match="kernels `rows` do not tell what routers say"):
        assert_routers_heard(model, PAIR)
    attach_engine(model, TransformersEngine(packed(model)))
    assert_routers_heard(model, PAIR)
    with pytest.raises(ConfigError, match="LlamaForCausalLM returns no router logits"):
        assert_routers_heard(packed(tiny_model("llama")), PAIR)
    watch = RouterWatch(tiny_model("llama"))
    watch.take((torch.zeros(5, 4),))
    with pytest.raises(ConfigError, match="does not say how many experts"):
        watch.loss()


@pytest.mark.parametrize("name", ["bloom", "gpt2", "llama"])
def test_the_layers_of_any_decoder_are_found_for_fp8(name: str) -> None:
    model = tiny_model(name)
    quantise_layers(model, "cpu")
    quantised = sum(isinstance(module, Fp8Linear) for module in model.modules())
    assert bool(quantised) == (name != "gpt2"), "GPT-2 has Conv1D, no linear layers"


def test_an_engine_is_made_once_where_none_is_attached() -> None:
    model = tiny_model("lfm2")
    assert engine_of(model) is engine_of(model)
    assert attached_engine(model) is engine_of(model)


def test_a_model_without_an_engine_is_scored_on_packed_attention_or_not_at_all() -> None:
    """On the attention that it was loaded with, an answer would not see its prompt, and nothing would say so."""
    model = tiny_model("llama")
    together, _ = score_groups(model, [PAIR, OTHER_PAIR], 10_000)
    rows = [Group(group.prompt, (answer,)) for group in (PAIR, OTHER_PAIR) for answer in group.completions]
    assert together == pytest.approx([score_groups(model, [row], 10_000)[0][0] for row in rows], abs=1e-4)
    with pytest.raises(ConfigError, match="takes no positions and no tables of a packed batch, so nothing computes"):
        engine_of(tiny_model("bloom"))


def test_a_completion_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="completion 2 of 2 behind a prompt of 3 tokens has no token"):
        Group([1, 2, 3], ([4], []))


def test_why_scores_that_are_compared_are_by_another_engine_is_told_by_both() -> None:
    def scoring(*served: str) -> Any:
        def score(first: str | None) -> tuple[Settled, str]:
            taken = first if first in served else served[0]
            note = "" if first == taken or taken == "fused" else f"no {first}"
            return Settled(taken, note), taken

        return score

    results = alike([scoring("fused", "transformers"), scoring("transformers")])
    assert results == [(Settled("transformers", "no fused"), "transformers")] * 2


def test_the_longest_row_is_looked_for_among_held_out_pairs_too(tmp_path: Path) -> None:
    columns = {"pair_id": ["a"], "prompt_ids": [[3, 4]], "chosen_ids": [[5, 6]], "rejected_ids": [[7]]}
    pl.DataFrame(columns).write_parquet(tmp_path / "train.parquet")
    to_group = partial(dpo_group, max_length=64)
    assert longest_group(tmp_path, to_group, tmp_path / "one").longest_row == 4
    pl.DataFrame(columns | {"chosen_ids": [[5] * 9]}).write_parquet(tmp_path / "eval.parquet")
    assert longest_group(tmp_path, to_group, tmp_path / "both").longest_row == 11
