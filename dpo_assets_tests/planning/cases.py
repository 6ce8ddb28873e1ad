"""Devices, shapes and datasets that planning tests start from."""

from __future__ import annotations

from typing import Any

from dpo_assets.planning.cards import find_card
from dpo_assets.planning.dataset import DatasetStats
from dpo_assets.planning.families import describe
from dpo_assets.planning.memory import described_parameters
from dpo_assets.planning.plan import TrainingPlan, make_plan
from dpo_assets.planning.precision import Device
from dpo_assets.planning.shape import ModelShape
from dpo_assets.planning.sizes import find_model
from dpo_assets_tests.samples import recipe

CPU = Device("cpu", "CPU", 16.0)
V100, T4, A100, L4, RTX_4090, H200 = (
    find_card(name).device() for name in ("v100-16", "t4", "a100-80", "l4", "rtx4090", "h200")
)
ONE_B, EIGHT_B, SEVENTY_B = (find_model(name).shape for name in ("1b", "8b", "70b"))
TINY = ModelShape(
    parameters=260_032, layers=5, hidden=64, intermediate=172, vocabulary=512, context=512, heads=8, kv_heads=4,
    head_dim=8, tied=True, architecture="LlamaForCausalLM", model_type="llama",
    decoder=describe({
        "model_type": "llama", "num_hidden_layers": 5, "hidden_size": 64, "intermediate_size": 172, "vocab_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }),
)  # fmt: skip


def shape_of(**config: Any) -> ModelShape:
    decoder = describe(config)
    assert decoder is not None
    return ModelShape(
        parameters=described_parameters(decoder), layers=len(decoder.layers), hidden=decoder.hidden,
        intermediate=config["intermediate_size"], vocabulary=decoder.vocabulary, context=32_768, decoder=decoder,
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_dim=config["head_dim"],
    )  # fmt: skip


def data(**changes: Any) -> DatasetStats:
    values: dict[str, Any] = {
        "train_pairs": 1000,
        "eval_pairs": 100,
        "max_length": 1024,
        "longest_pair": 1500,
        "mean_pair": 600.0,
    }
    return DatasetStats(**values | changes)


def planned(shape: ModelShape, device: Device, stats: DatasetStats | None = None, **sections: Any) -> TrainingPlan:
    return make_plan(recipe(**sections), shape, stats or data(), device)
