"""Any causal model is scored, in every stage: by the fastest engine that is exact for it, by its own forward at last.

Each model is tiny and random (`tiny_models`), and is held against its own eager attention, row by row.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaForCausalLM

from dpo_assets.contract import EvaluateSpec, MergeSpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.attention import attend_packed, plain_attention
from dpo_assets.training.engines.fused.decoder import FusedDecoder
from dpo_assets.training.engines.transformers import engine_of
from dpo_assets.training.guard.sampling import AdapterState, Watched, attach_scorer
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.models.loading import attach_adapter, load_base, switch_off_dropout
from dpo_assets.training.models.structure import causal_lm
from dpo_assets.training.policy import load_policy
from dpo_assets.training.scoring.logprobs import score_groups, score_tokens, sequence_logps
from dpo_assets.training.scoring.proof import NotExactError, Settled, alike, assert_exact, settle_engine
from dpo_assets.training.stages import dpo, evaluate, merge, sft
from dpo_assets.training.trainers.classic import classic_trainer
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import row_logps, summed_logps
from dpo_assets_tests.training.tiny_models import (
    NAMES,
    OTHER_PAIR,
    PAIR,
    SHORT_PAIR,
    tiny_config,
    tiny_folder,
    tiny_model,
)
from dpo_assets_tests.training.trl_dense_scoring import dense_scoring

# Everything else runs on Transformers' layers over the packed stream.
OWN_FORWARD = {
    "bloom": "computes its own bias by distance from a padded batch",
    "mpt": "the same",
    "falcon+alibi": "the same",
    "mamba": "no attention, and no positions to pack by",
    "llama4_text": "attention within chunks, which its layers leave to their mask",
    "nemotron": "its layers do not hand the batch on to their attention",
}


@pytest.fixture
def plan(plan_for: PlanMaker) -> TrainingPlan:
    return plan_for()


# --- the table --------------------------------------------------------------------------------------------------------


def with_lora(name: str, lm: Any) -> Any:
    """An adapter that does something on every linear layer that PEFT adapts."""
    # PEFT refuses an output that Mamba never calls, and takes Llama 4's router for a plain linear layer.
    kept_out = {"mamba": ["out_proj"], "falcon_h1": ["out_proj"], "llama4_text": ["router"]}.get(name)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=kept_out, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(lm, lora).eval()


def dpo_step(model: Any, chosen: Tensor, rejected: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss of a pair and the gradient of every LoRA factor."""
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected) - 1.0)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients


def own_step(model: Any) -> tuple[float, dict[str, Tensor]]:
    """By the model's own forward and eager attention, which leave nothing of its architecture out."""
    with plain_attention(model, "eager"):
        return dpo_step(model, *(row_logps(model, PAIR.prompt, list(answer)).sum() for answer in PAIR.completions))


def engine_step(model: Any) -> tuple[float, dict[str, Tensor]]:
    batch = pack([PAIR])
    return dpo_step(model, *sequence_logps(score_tokens(model, batch), batch))


def assert_equal_steps(ours: tuple[float, dict[str, Tensor]], own: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(own[0], abs=1e-4)
    assert ours[1].keys() == own[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in own[1].values())
    assert largest > 1e-3
    for name, gradient in own[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=1e-4 * min(1.0, largest), rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_scores_loss_and_every_gradient_are_those_of_the_models_own_forward(name: str, plan: TrainingPlan) -> None:
    model = with_lora(name, tiny_model(name))
    settled = settle_engine(model, plan, PAIR)
    assert settled.kernels.partition(",")[0] == ("rows" if name in OWN_FORWARD else "transformers"), settled.note
    assert bool(settled.note) == (name in OWN_FORWARD), "whatever is not as planned is said"
    scores, _ = score_groups(model, [PAIR, OTHER_PAIR], budget=1000)
    with plain_attention(model, "eager"):
        assert scores == pytest.approx(summed_logps(model, [PAIR, OTHER_PAIR]), abs=1e-4)
    own = own_step(model)
    assert_equal_steps(engine_step(model), own)
    # Layers that are computed again in the backward pass are handed the packed batch again.
    switch_off_dropout(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    assert_equal_steps(engine_step(model), own)


def test_rows_serve_a_model_that_packing_serves_too(plan: TrainingPlan) -> None:
    rows = plan.model_copy(update={"kernels": "rows"})
    model = with_lora("gemma2", tiny_model("gemma2"))
    assert settle_engine(model, rows, PAIR) == Settled("rows")
    assert_equal_steps(engine_step(model), own_step(model))
    assert settle_engine(model, rows, PAIR) == Settled("rows"), "what is attached stays"
    assert settle_engine(model, rows, PAIR, "transformers") == Settled("transformers"), "unless another is asked for"


@pytest.mark.parametrize("name", ["bloom", "mamba", "llama4_text"])
def test_rows_that_cost_more_than_the_budget_go_through_in_runs_with_the_same_gradient(
    name: str, plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two rows of the pair are 18 and 30 tokens wide, so no budget below 60 holds both."""
    model = with_lora(name, tiny_model(name)).train()
    settle_engine(model, plan.model_copy(update={"kernels": "rows", "token_budget": 59}), PAIR)
    widths: list[tuple[int, ...]] = []
    embed = model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))
    step = engine_step(model)
    assert widths == [(1, 30), (1, 18), (1, 18), (1, 30)], "each run forward, and again in the backward pass"
    widths.clear()
    score_groups(model, [PAIR], budget=1000)
    assert widths == [(1, 30), (1, 18)], "without a gradient only once"
    assert_equal_steps(step, own_step(model))


# --- which engine -----------------------------------------------------------------------------------------------------


class HalvedLogits(LlamaForCausalLM):
    """An architecture with a factor behind its head that nothing in its config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


class LooksAhead(LlamaForCausalLM):
    """No causal model: what follows a token, padding included, changes what is computed for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output


def remade(kind: type[LlamaForCausalLM]) -> Any:
    llama = tiny_model("llama")
    model = kind(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    return model


def test_a_head_that_this_project_cannot_say_is_the_models_own(plan: TrainingPlan) -> None:
    model = with_lora("llama", remade(HalvedLogits))
    settled = settle_engine(model, plan, PAIR)
    assert settled.kernels == "rows, own logits"
    assert settled.note.count("nats row by row") == 2, "neither packed nor on rows was it this head"
    assert_equal_steps(engine_step(model), own_step(model))
    scores, plain = score_tokens(model, pack([PAIR])), row_logps(model, PAIR.prompt, list(PAIR.completions[0]))
    logits = model(input_ids=torch.tensor([[*PAIR.prompt, *PAIR.completions[0]]])).logits[0, len(PAIR.prompt) - 1 : -1]
    n = len(plain)
    torch.testing.assert_close(scores.logps[:n], plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.entropy[:n], torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(scores.mean_logits[:n], logits.mean(-1))
    assert torch.equal(scores.top1[:n], logits.argmax(-1) == torch.tensor(PAIR.completions[0]))


def test_a_model_that_nothing_computes_as_its_own_forward_does_is_refused(plan: TrainingPlan) -> None:
    with pytest.raises(ConfigError, match=r"LooksAhead is computed by nothing here.*another architecture"):
        settle_engine(remade(LooksAhead), plan, PAIR)


def test_an_encoder_that_is_read_as_a_causal_model_is_refused(plan: TrainingPlan) -> None:
    """BERT attends to both sides unless its config says `is_decoder`; it agrees with itself on padded rows."""
    small = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    encoder = BertLMHeadModel(small).eval()
    for parameter in encoder.parameters():
        parameter.data.mul_(5)
    with pytest.raises(ConfigError, match=r"BertLMHeadModel scores an answer's first 10 tokens .* no causal language"):
        settle_engine(encoder, plan, PAIR)
    decoder = BertLMHeadModel(BertConfig(**small.to_diff_dict() | {"is_decoder": True})).eval()
    decoder.load_state_dict(encoder.state_dict())
    assert settle_engine(decoder, plan, PAIR).kernels == "rows, own logits"


def test_what_only_long_rows_feel_is_not_seen_on_short_ones(plan: TrainingPlan) -> None:
    """Why the stages must prove an engine on their longest row and not on their first pair."""
    model = tiny_model("llama4_text")
    assert settle_engine(model, plan, SHORT_PAIR).kernels == "transformers"
    with pytest.raises(NotExactError, match="nats row by row"):
        assert_exact(model, PAIR)
    assert settle_engine(model, plan, PAIR).kernels == "rows"


@pytest.mark.parametrize("name", ["nemotron", "lfm2", "qwen3_5_text"])
def test_what_rows_leave_to_one_another_is_seen_where_each_group_is_one_row(
    name: str, plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT's groups: a stream of a single row is exact also where layers mix rows, by attention or by a state."""
    monkeypatch.setattr("dpo_assets.training.engines.transformers.serve_packed", lambda lm: None)
    settled = settle_engine(tiny_model(name), plan, Group(PAIR.prompt, PAIR.completions[:1]))
    assert (settled.kernels, settled.note.count("nats row by row")) == ("rows", 1)


def test_layers_that_fail_on_a_packed_batch_hand_over_to_rows(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    layer = model.get_decoder().layers[0].forward

    def wants_a_mask(*args: Any, packed: Any = None, **kwargs: Any) -> Any:
        if packed is not None:
            raise KeyError("attention_mask")
        return layer(*args, **kwargs)

    model.get_decoder().layers[0].forward = wants_a_mask
    settled = settle_engine(model, plan, PAIR)
    assert settled == Settled("rows", "`transformers` fails: KeyError: 'attention_mask'")


def test_memory_that_runs_out_in_the_proof_says_nothing_about_the_engine(plan: TrainingPlan) -> None:
    model = tiny_model("llama")

    def too_large(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    model.get_decoder().layers[0].forward = too_large
    with pytest.raises(torch.OutOfMemoryError):
        settle_engine(model, plan, PAIR)


def test_fused_layers_that_are_not_exact_are_replaced_and_it_is_said(
    model_folder: Path, plan: TrainingPlan, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description that says too little of an architecture must cost time alone."""
    own = FusedDecoder.hidden
    monkeypatch.setattr(FusedDecoder, "hidden", lambda *args, **kwargs: own(*args, **kwargs) * 1.05)
    fused = plan.model_copy(update={"kernels": "fused"})
    policy = load_policy(model_folder, fused, None, seed=0, dropout=0.0)
    assert (policy.kernels, policy.note) == ("fused", "")
    proven = policy.proven(fused, groups[0])
    assert proven.kernels == "transformers"
    assert "by `fused`" in proven.note
    assert engine_of(policy.model).name == "transformers"
    assert proven.told("dpo", fused).startswith("dpo: computed by transformers, not by fused kernels: LlamaForCausalLM")


def scoring(*served: str) -> Callable[[str | None], tuple[Settled, str]]:
    """A scoring whose model is exact on some engines alone."""
    chain = ("fused", "transformers", "rows")

    def score(first: str | None) -> tuple[Settled, str]:
        taken = next(name for name in chain[chain.index(first or "fused") :] if name in served)
        return Settled(taken), f"by {taken}"

    return score


@pytest.mark.parametrize(
    ("served", "by"),
    [
        ((("fused", "rows"), ("fused", "rows")), "fused"),
        ((("fused", "transformers"), ("transformers",)), "transformers"),
        ((("transformers", "rows"), ("fused", "rows")), "rows"),
    ],
)
def test_scores_that_are_compared_are_by_one_engine(served: Sequence[Sequence[str]], by: str) -> None:
    results = alike([scoring(*names) for names in served])
    assert results == [(Settled(by), f"by {by}")] * 2


# --- attention and dropout of Transformers' layers --------------------------------------------------------------------


def test_plain_attention_brings_the_packed_one_back(model_folder: Path, plan: TrainingPlan) -> None:
    model = load_base(model_folder, plan)
    assert attend_packed(model)
    with plain_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "packed_rows"


def test_generation_takes_eager_attention_where_a_model_has_no_other(plan: TrainingPlan) -> None:
    """Transformers has no SDPA with sinks, and refuses it by a ValueError."""
    model = tiny_model("gpt_oss")
    settle_engine(model, plan, PAIR)
    with plain_attention(model):
        assert model.config._attn_implementation == "eager"


def test_an_adapter_without_dropout_leaves_none_in_its_base(plan: TrainingPlan) -> None:
    """Seed-OSS and others keep rates as numbers on their modules; two scores of a pair in training would differ."""
    lm = tiny_model("seed_oss", attention_dropout=0.5, residual_dropout=0.5)
    model = attach_adapter(lm, plan, None, seed=1, dropout=0.0).train()
    settle_engine(model, plan, PAIR)
    first, second = (score_tokens(model, pack([PAIR])).logps for _ in range(2))
    assert torch.equal(first, second)
    with plain_attention(model, "eager"), torch.no_grad():
        own = row_logps(model, PAIR.prompt, list(PAIR.completions[0]))
    torch.testing.assert_close(first[: len(own)], own, atol=1e-5, rtol=0)


# --- the stages -------------------------------------------------------------------------------------------------------


CHUNK = 80
# The larger pair has the shorter rows: 70 tokens, inside a chunk. The rows of the other have 110.
LARGER_PAIR = Group([3 + 7 * n % 500 for n in range(10)], ([5] * 60, [6] * 60))
LONGER_ROWS = Group([3 + 11 * n % 500 for n in range(100)], ([9, 8] * 5, [7] * 10))


def whole_folder(name: str, folder: Path, model_folder: Path, **changes: Any) -> Path:
    """A model with the tokenizer of the built-in one."""
    folder.mkdir()
    tiny_folder(name, folder, vocab_size=512, **changes)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_folder / file, folder / file)
    return folder


def pairs_of(*groups: Group) -> pl.DataFrame:
    """A split as the stages read it."""
    message = [[{"role": "user", "content": "Hello"}]] * len(groups)
    answer = [[{"role": "assistant", "content": "Hello"}]] * len(groups)
    columns = {
        "pair_id": [str(n) for n in range(len(groups))],
        "prompt_id": [str(n) for n in range(len(groups))],
        "group_id": [str(n) for n in range(len(groups))],
        "source": ["made here"] * len(groups),
        "margin": [None] * len(groups),
        "prompt": message,
        "chosen": answer,
        "rejected": answer,
        "prompt_ids": [list(group.prompt) for group in groups],
        "chosen_ids": [list(group.completions[0]) for group in groups],
        "rejected_ids": [list(group.completions[1]) for group in groups],
    }
    return pl.DataFrame(columns)


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    pairs_of(LARGER_PAIR, LONGER_ROWS).write_parquet(folder / "train.parquet")
    pairs_of(LONGER_ROWS, LARGER_PAIR).write_parquet(folder / "eval.parquet")
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def own_scores(folder: Path, *groups: Group) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return summed_logps(model, groups)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama4_text", {"attention_chunk_size": CHUNK, "max_position_embeddings": 256}, "nats row by row"),
        ("bloom", {}, "takes no positions and no tables"),
    ],
)
def test_every_stage_runs_on_a_models_own_forward(
    name: str, changes: dict[str, Any], said: str, plan_for: PlanMaker, train_spec: SpecMaker, model_folder: Path,
    small_dataset: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Llama 4's chunks are felt by the longest row alone, which is not in the largest pair."""
    assert LARGER_PAIR.tokens > LONGER_ROWS.tokens
    base = whole_folder(name, tmp_path / "base", model_folder, **changes)
    plan = plan_for(sft={"batch_size": 2, "epochs": 1.0}, dpo={"batch_size": 2}, token_budget=200)
    targets = ["o_proj"] if name == "llama4_text" else ["query_key_value"]
    lora = plan.lora.model_copy(update={"target_modules": targets})
    plan = plan.model_copy(update={"sft_steps": 1, "dpo_steps": 1, "lora": lora})
    log = Log()

    sft.run(train_spec(plan, tmp_path / "sft", base_model=base, dataset=small_dataset), log)
    begun = tmp_path / "sft" / "adapter"
    spec = train_spec(plan, tmp_path / "dpo", base_model=base, dataset=small_dataset, start_adapter=begun)
    dpo.run(spec, log)
    report = report_of(tmp_path / "dpo")
    assert report["kernels"] == report_of(tmp_path / "sft")["kernels"] == "rows"
    assert said in report["kernels_note"]
    assert report["first_loss"] == pytest.approx(report["expected_first_loss"], abs=1e-4)
    assert any(line.startswith("dpo: computed by rows, not by transformers kernels: ") for line in log.messages)

    common: dict[str, Any] = {"fingerprint": "f" * 32, "inputs": {}, "base_model": base, "dataset": small_dataset}
    adapter = tmp_path / "dpo" / "adapter"
    for stage in ("merge", "evaluate"):
        (tmp_path / stage).mkdir()
    merge.run(
        MergeSpec(output_dir=tmp_path / "merge", plan=plan, adapter=adapter, probe_pairs=2, **common),
        log,
    )
    merged = report_of(tmp_path / "merge")
    assert merged["kernels"] == "rows"
    assert merged["max_difference_per_token"] < 1e-5
    evaluate.run(
        EvaluateSpec(
            output_dir=tmp_path / "evaluate", plan=plan, sft_adapter=begun, policy=tmp_path / "merge" / "model",
            adapter=adapter, confidence=0.95, generations=1, max_new_tokens=2, min_pairs=1, **common,
        ),
        log,
    )  # fmt: skip
    assert report_of(tmp_path / "evaluate")["kernels"] == "rows"
    scores = pl.read_parquet(tmp_path / "evaluate" / "scores.parquet")
    policy = [value for row in scores.select("policy_chosen", "policy_rejected").rows() for value in row]
    own = own_scores(tmp_path / "merge" / "model", LONGER_ROWS, LARGER_PAIR)
    assert policy == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "target", "kernels"), [("bloom", "query_key_value", "rows"), ("gpt_oss", "o_proj", "transformers")]
)
def test_trls_own_trainer_runs_and_its_model_is_scored_beside_it(
    name: str, target: str, kernels: str, plan_for: PlanMaker, model_folder: Path, tmp_path: Path
) -> None:
    """TRL scores with a kernel for GPUs, so a stand-in takes its place here; the rest is TRL's own trainer.

    A mixture's balancing loss must not join the loss: the first one would not be ln 2.
    """
    base = whole_folder(name, tmp_path / "base", model_folder)
    plan = plan_for(dpo={"trainer": "trl", "batch_size": 2})
    plan = plan.model_copy(
        update={"dpo_steps": 2, "lora": plan.lora.model_copy(update={"target_modules": [target]}), "max_length": 64}
    )
    message, other = ({"role": "assistant", "content": text} for text in ("Once upon a time", "No"))
    asked = [[{"role": "user", "content": f"Hello {n}"}] for n in range(4)]
    rows = Dataset.from_list([{"prompt": prompt, "chosen": [message], "rejected": [other]} for prompt in asked])
    policy = load_policy(base, plan, None, seed=0, dropout=0.0, packed=False)
    chat = load_chat_format(base)
    with dense_scoring():
        trainer = classic_trainer(policy.model, chat.rendering_tokenizer(), rows, plan, tmp_path / "trl")
        before = causal_lm(policy.model).config._attn_implementation
        attach_scorer(policy.model, plan, PAIR)
        assert causal_lm(policy.model).config._attn_implementation == before, "TRL trains it as it was"
        assert engine_of(policy.model).name == kernels
        watched = Watched(policy.model, AdapterState(policy.model), chat, plan, policy.kernels)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    scores, _ = watched.scores([PAIR])
    with plain_attention(policy.model.eval(), "eager"):
        assert scores == pytest.approx(summed_logps(policy.model, [PAIR]), abs=1e-4)
    assert watched.reference_scores([PAIR])[0] != pytest.approx(scores, abs=1e-3)


def test_attention_of_each_layers_own_kind_reaches_the_packed_layers() -> None:
    """A window, a cap or sinks that are too weak to be seen would prove nothing."""
    for name, change in (
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gpt_oss", {"sliding_window": 128}),
        ("mistral+window", {"sliding_window": None}),
    ):
        other = tiny_model(name)
        other.config.update(change)
        changed = type(other)(tiny_config(name, **change)).eval()
        changed.load_state_dict(other.state_dict())
        changed.set_attn_implementation("eager")
        assert summed_logps(changed, [PAIR]) != pytest.approx(summed_logps(tiny_model(name), [PAIR]), abs=1e-2), name
    without = tiny_model("gpt_oss")
    for layer in causal_lm(without).model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert summed_logps(without, [PAIR]) != pytest.approx(summed_logps(tiny_model("gpt_oss"), [PAIR]), abs=1e-2)
