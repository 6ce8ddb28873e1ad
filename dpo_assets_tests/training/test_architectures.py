"""Which architectures the packed path may serve: it scores them exactly, or `assert_packing_is_exact` refuses them.

Each model is tiny and random, with weights large enough that another attention gives other scores.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dpo_assets.contract import EvaluateSpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.models.loading import load_base, plain_attention
from dpo_assets.training.scoring.logprobs import assert_packing_is_exact, score_groups
from dpo_assets.training.stages import dpo, evaluate
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dense import summed_logps

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEADS: dict[str, Any] = {"head_dim": 8}
WINDOW: dict[str, Any] = {"sliding_window": 8}
NO_WINDOW: dict[str, Any] = {"sliding_window": 128}
PAIR = Group(list(range(3, 23)), (list(range(5, 17)), list(range(20, 50))))  # Rows of 32 and 50 tokens.
SHORT_PAIR = Group([3, 4], ([5, 6], [7]))  # Shorter than every window here.


@pytest.fixture
def plan(plan_for: PlanMaker) -> TrainingPlan:
    return plan_for()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[PreTrainedConfig], Path]:
    """A folder with a random model of a configuration."""

    def save(config: PreTrainedConfig) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
        model.save_pretrained(tmp_path)
        return tmp_path

    return save


def own_scores(folder: Path, group: Group) -> list[float]:
    """What the model itself says: its own eager attention, which leaves nothing of its architecture out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return summed_logps(model, [group])


SERVED = {
    "llama": LlamaConfig(**SMALL),
    "mistral without a window": MistralConfig(**SMALL, sliding_window=None),
    "qwen3": Qwen3Config(**SMALL, **HEADS),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "granite, which divides its logits": GraniteConfig(**SMALL, logits_scaling=3.0, attention_multiplier=0.2),
    "cohere, which multiplies its logits": CohereConfig(**SMALL, logit_scale=0.25),
    "gemma3 with rows inside the window": Gemma3TextConfig(**SMALL, **HEADS, **NO_WINDOW, query_pre_attn_scalar=8),
}


@pytest.mark.parametrize("config", SERVED.values(), ids=SERVED)
def test_plain_causal_attention_is_served_exactly(
    config: PreTrainedConfig, saved: Callable[[PreTrainedConfig], Path], plan: TrainingPlan
) -> None:
    folder = saved(config)
    model = load_base(folder, plan).eval()
    assert score_groups(model, [PAIR], budget=1000)[0] == pytest.approx(own_scores(folder, PAIR), abs=1e-4)
    assert_packing_is_exact(model, PAIR)


NOT_SERVED = {
    "mistral with a sliding window": MistralConfig(**SMALL, **WINDOW),
    "qwen2 with a sliding window": Qwen2Config(**SMALL, **WINDOW, use_sliding_window=True, max_window_layers=0),
    "phi3 with a sliding window": Phi3Config(**SMALL, **WINDOW),
    "gemma3, every layer but some with a window": Gemma3TextConfig(**SMALL, **HEADS, **WINDOW, query_pre_attn_scalar=8),
    "gemma2, which caps its attention scores": Gemma2Config(
        **SMALL, **HEADS, **NO_WINDOW, attn_logit_softcapping=1.0, query_pre_attn_scalar=8
    ),
    "gpt-oss, which has attention sinks": GptOssConfig(
        **SMALL, **HEADS, **NO_WINDOW, num_local_experts=2, num_experts_per_tok=1
    ),
    "bloom, which has ALiBi": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "mpt, which has ALiBi": MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "falcon with ALiBi": FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "mamba, which has no attention": MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2),
}


@pytest.mark.parametrize("config", NOT_SERVED.values(), ids=NOT_SERVED)
def test_any_other_attention_is_refused_with_the_way_out(
    config: PreTrainedConfig, saved: Callable[[PreTrainedConfig], Path], plan: TrainingPlan
) -> None:
    """Packed scores of these are wrong, so training on them would optimise another model than the one released."""
    folder = saved(config)
    with pytest.raises(ConfigError, match="base of another architecture"):
        assert_packing_is_exact(load_base(folder, plan).eval(), PAIR)


def test_a_window_that_only_long_rows_feel_is_found_in_a_dataset_that_starts_with_a_short_one(
    saved: Callable[[PreTrainedConfig], Path], plan: TrainingPlan
) -> None:
    """Why the stages must not probe just their first pair: nothing can be seen on this one."""
    folder = saved(MistralConfig(**SMALL, **WINDOW))
    model = load_base(folder, plan).eval()
    assert score_groups(model, [SHORT_PAIR], 100)[0] == pytest.approx(own_scores(folder, SHORT_PAIR), abs=1e-4)
    assert score_groups(model, [PAIR], 100)[0] != pytest.approx(own_scores(folder, PAIR), abs=0.1)


@pytest.fixture
def windowed(saved: Callable[[PreTrainedConfig], Path], model_folder: Path) -> Path:
    """A whole model folder, tokenizer included, whose attention sees 80 tokens back."""
    folder = saved(MistralConfig(**(SMALL | {"vocab_size": 512, "max_position_embeddings": 256}), sliding_window=80))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_folder / name, folder / name)
    return folder


def pairs_of(*groups: Group) -> pl.DataFrame:
    """A split as the stages read it."""
    message = [[{"role": "user", "content": "Hello"}]] * len(groups)
    columns = {
        "pair_id": [str(n) for n in range(len(groups))],
        "prompt_id": [str(n) for n in range(len(groups))],
        "prompt": message,
        "prompt_ids": [list(group.prompt) for group in groups],
        "chosen_ids": [list(group.completions[0]) for group in groups],
        "rejected_ids": [list(group.completions[1]) for group in groups],
    }
    return pl.DataFrame(columns)


def some_tokens(count: int, first: int) -> list[int]:
    return [3 + (first + 7 * n) % 500 for n in range(count)]


# The larger pair has the shorter rows: 70 tokens, inside the window. The rows of the other have 110.
LARGER_PAIR = Group(some_tokens(10, 0), (some_tokens(60, 1), some_tokens(60, 2)))
LONGER_ROWS = Group(some_tokens(100, 3), (some_tokens(10, 4), some_tokens(10, 5)))


def test_the_dpo_stage_probes_its_longest_row_and_not_its_largest_pair(
    windowed: Path, plan: TrainingPlan, train_spec: SpecMaker, tmp_path: Path
) -> None:
    assert LARGER_PAIR.tokens > LONGER_ROWS.tokens
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    pairs_of(LARGER_PAIR, LONGER_ROWS).write_parquet(dataset / "train.parquet")
    with pytest.raises(ConfigError, match="base of another architecture"):
        dpo.run(train_spec(plan, tmp_path / "out", base_model=windowed, dataset=dataset), Log())


def test_held_out_scores_of_a_model_that_cannot_be_packed_are_its_own_or_refused(
    windowed: Path, plan: TrainingPlan, tmp_path: Path
) -> None:
    """Full attention would judge another model than the one that was trained."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "out").mkdir()
    pairs_of(LONGER_ROWS).write_parquet(tmp_path / "dataset" / "eval.parquet")
    spec = EvaluateSpec(
        output_dir=tmp_path / "out",
        fingerprint="f" * 32,
        inputs={},
        base_model=windowed,
        dataset=tmp_path / "dataset",
        plan=plan,
        sft_adapter=None,
        policy=windowed,
        confidence=0.95,
        generations=0,
        max_new_tokens=1,
        min_pairs=1,
    )
    try:
        evaluate.run(spec, Log())
    except ConfigError:
        return
    scores = pl.read_parquet(tmp_path / "out" / "scores.parquet").row(0, named=True)
    assert [scores["sft_chosen"], scores["sft_rejected"]] == pytest.approx(own_scores(windowed, LONGER_ROWS), abs=1e-3)


def test_plain_attention_brings_the_packed_one_back(model_folder: Path, plan: TrainingPlan) -> None:
    model = load_base(model_folder, plan)
    with plain_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "packed_rows"
