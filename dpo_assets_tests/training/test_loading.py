"""What is loaded, and what is refused before anything is trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_assets.errors import ConfigError
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.models.loading import ADAPTER_NAME, attach_adapter, load_base, load_causal_lm, save_adapter
from dpo_assets.training.models.merging import NotStreamable, plan_merge
from dpo_assets.training.models.targets import coverage
from dpo_assets.training.scoring.logprobs import score_groups
from dpo_assets_tests.training.conftest import PlanMaker
from dpo_assets_tests.training.tiny_models import PAIR, tiny_folder


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    """The model folder, free to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_a_new_adapter_starts_as_the_base(model_folder: Path, plan_for: PlanMaker) -> None:
    model = attach_adapter(load_base(model_folder, plan_for()), plan_for(), None, seed=1, dropout=0.0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            assert not parameter.any()


def test_equal_seeds_give_equal_adapters(model_folder: Path, plan_for: PlanMaker) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = attach_adapter(load_base(model_folder, plan_for()), plan_for(), None, seed=seed, dropout=0.0)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_trained_adapter_comes_back_as_it_was_saved_and_trains_on(
    model_folder: Path, plan_for: PlanMaker, sft_adapter: Path, tmp_path: Path
) -> None:
    model = attach_adapter(load_base(model_folder, plan_for()), plan_for(), sft_adapter, seed=1, dropout=0.0)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == []
    assert any(p.requires_grad for p in model.parameters())
    save_adapter(model, tmp_path / "again")
    first, again = ((folder / "adapter_model.safetensors").read_bytes() for folder in (sft_adapter, tmp_path / "again"))
    assert first == again


def test_an_adapter_as_large_as_its_base_is_refused(model_folder: Path, plan_for: PlanMaker) -> None:
    """Training most of the weights is full fine-tuning, which nobody asked for."""
    plan = plan_for(lora={"rank": 512})
    with pytest.raises(ConfigError, match="parameters would be trained"):
        attach_adapter(load_base(model_folder, plan), plan, None, seed=1, dropout=0.0)


def rewritten(path: Path, **changes: Any) -> None:
    """A JSON file with keys changed; None takes a key away."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


def test_a_model_none_of_whose_files_names_an_end_is_refused(copied: Path) -> None:
    rewritten(copied / "tokenizer_config.json", eos_token=None, pad_token=None)
    rewritten(copied / "generation_config.json", eos_token_id=None)
    assert load_chat_format(copied).ends == {1}, "config.json names one"
    rewritten(copied / "config.json", eos_token_id=None)
    with pytest.raises(ConfigError, match="nothing ends an answer"):
        load_chat_format(copied)


def test_a_tokenizer_without_padding_pads_with_eos(copied: Path) -> None:
    path = copied / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"pad_token": None}), encoding="utf-8")
    tokenizer: Any = load_chat_format(copied).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_pickled_weights_are_never_read(copied: Path, plan_for: PlanMaker) -> None:
    state = AutoModelForCausalLM.from_pretrained(copied).state_dict()
    (copied / "model.safetensors").unlink()
    torch.save(state, copied / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no file named model\.safetensors"):
        load_base(copied, plan_for())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("Mamba needs causal_conv1d"), "needs a package that this environment lacks: Mamba needs causal"),
        (RuntimeError("some issues during automatic conversion of the weights."), "cannot be put into the form"),
        (torch.OutOfMemoryError("CUDA out of memory"), ""),
    ],
    ids=["package", "conversion", "memory"],
)
def test_what_keeps_a_model_from_being_loaded_is_a_fault_of_the_folder_unless_memory_is(
    error: Exception, said: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put in, because neither such a model nor such a device is here."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ConfigError if said else torch.OutOfMemoryError, match=said):
        load_causal_lm(model_folder)


def test_a_quantised_base_without_bitsandbytes_is_refused_with_what_to_install(
    model_folder: Path, plan_for: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    for precision in ("4bit", "8bit"):
        with pytest.raises(ConfigError, match=r"needs bitsandbytes.*dpo-assets\[gpu\]"):
            load_base(model_folder, plan_for(precision=precision))


def test_linear_layers_that_keep_their_weight_the_other_way_round_are_adapted_and_merged(
    tmp_path: Path, plan_for: PlanMaker
) -> None:
    """GPT-2's. Two of the four kinds are square or near it, where a wrong side would not be seen by its shape."""
    base = tiny_folder("gpt2", tmp_path / "base")
    plan = plan_for()
    plan = plan.model_copy(update={"lora": plan.lora.model_copy(update={"target_modules": ["c_attn", "c_proj"]})})
    model = attach_adapter(load_base(base, plan), plan, None, seed=1, dropout=0.0)
    covered = {kind.name: kind.adapted / kind.weights for kind in coverage(model, ADAPTER_NAME).kinds}
    assert covered == {"attn.c_attn": 1.0, "attn.c_proj": 1.0, "mlp.c_fc": 0.0, "mlp.c_proj": 1.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    before = score_groups(model.eval(), [PAIR], 1000)[0]
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(NotStreamable, match="fan_in_fan_out"):
        plan_merge(base, tmp_path / "adapter")
    merged = attach_adapter(load_base(base, plan), plan, tmp_path / "adapter", seed=1, dropout=0.0).merge_and_unload()
    assert score_groups(merged.eval(), [PAIR], 1000)[0] == pytest.approx(before, abs=1e-4)
    assert before != pytest.approx(score_groups(load_base(base, plan).eval(), [PAIR], 1000)[0], abs=1e-2)
