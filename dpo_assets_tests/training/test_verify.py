"""A base is one whole model before anything is made from it: what its config needs is in its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dpo_assets.contract import VERIFIED, TemplateSettings, VerifiedBase, VerifySpec
from dpo_assets.errors import ConfigError
from dpo_assets.training.models.loading import load_base, load_causal_lm
from dpo_assets.training.stages import verify
from dpo_assets_tests.training.bases import copy_of, retensor, rewrite
from dpo_assets_tests.training.conftest import Log, PlanMaker

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return copy_of(model_folder, tmp_path / "base")


def verified(base: Path, template: TemplateSettings | None = None) -> VerifiedBase:
    out = base.parent / "verified"
    out.mkdir()
    spec = VerifySpec(
        output_dir=out,
        fingerprint="f" * 32,
        inputs={},
        base_model=base,
        template=template or TemplateSettings(),
    )
    verify.run(spec, Log())
    return VerifiedBase.model_validate_json((out / VERIFIED).read_bytes())


def test_the_embedded_model_is_whole(copied: Path) -> None:
    """No pipeline verifies it again: it is part of the package."""
    assert verified(copied) == VerifiedBase(unused_tensors=(), ends=("<s>", "</s>"))


def lose_a_layer(base: Path) -> None:
    retensor(base, lambda tensors: {k: v for k, v in tensors.items() if ".layers.4." not in k})


def lose_the_head(base: Path) -> None:
    rewrite(base / "config.json", tie_word_embeddings=False)


def widen(base: Path) -> None:
    rewrite(base / "config.json", intermediate_size=180)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer is missing": (lose_a_layer, r"no file holds model\.layers\.4\.input_layernorm\.weight, .* and 1 more"),
    "the head is missing": (lose_the_head, r"no file holds lm_head\.weight"),
    "another shape": (widen, r"the files hold model\.layers\.0\.mlp\.down_proj\.weight \(64, 172\), not \(64, 180\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tensors_that_would_be_drawn_at_random_are_named(copied: Path, plan_for: PlanMaker, name: str) -> None:
    """Each trained, merged and was released: Transformers only warns. Whoever loads it later refuses it too."""
    damage, message = FAULTS[name]
    damage(copied)
    with pytest.raises(ConfigError, match=message):
        verified(copied)
    with pytest.raises(ConfigError, match=message):
        load_base(copied, plan_for())


def test_a_model_whose_decoder_layers_cannot_be_told_is_refused_before_it_is_planned_for(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", lambda self: self.lm_head)
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM should have one list of its 5 decoder layers, and has none"
    ):
        verified(copied)


def test_a_missing_part_of_the_weights_is_a_fault_of_the_folder(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    shards = {EMBEDDING: "model-00002-of-00002.safetensors"}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors"):
        verified(copied)


def test_tensors_that_the_model_has_no_place_for_are_told(copied: Path) -> None:
    """The vision tower and the extra heads of checkpoints that are loaded as text alone."""
    retensor(copied, lambda tensors: tensors | {"visual.patch.weight": torch.zeros(2, 2)})
    assert verified(copied).unused_tensors == ("visual.patch.weight",)


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (1.0, True)], ids=["the same", "another"])
def test_a_head_stored_beside_the_embedding_it_is_tied_to_must_be_the_same(
    copied: Path, shift: float, refused: bool
) -> None:
    """Transformers 5 takes the stored head, earlier ones and vLLM the embedding."""
    retensor(copied, lambda tensors: tensors | {"lm_head.weight": tensors[EMBEDDING] + shift})
    if not refused:
        assert verified(copied).unused_tensors == ()
        return
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        verified(copied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_may_be_stored_in_another_number_format(copied: Path, dtype: torch.dtype) -> None:
    retensor(copied, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert verified(copied).unused_tensors == ()


@pytest.mark.parametrize("changes", [{"model_type": "mine"}, {"model_type": "nonesuch", "auto_map": None}])
def test_a_model_of_code_of_its_own_is_refused_and_its_code_is_not_run(copied: Path, changes: dict[str, Any]) -> None:
    auto_map = {"AutoConfig": "configuration_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"}
    rewrite(copied / "config.json", **({"auto_map": auto_map} | changes))
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Config: ...\nclass Model: ...\n"
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (copied / name).write_text(code)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        verified(copied)
    assert not (copied / "ran").exists()


def test_code_beside_a_model_that_the_library_knows_is_not_run(copied: Path) -> None:
    rewrite(copied / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Model"})
    (copied / "modeling_mine.py").write_text("raise SystemExit('ran')")
    assert verified(copied).unused_tensors == ()


def test_it_costs_no_memory_for_weights(model_folder: Path) -> None:
    model, _ = load_causal_lm(model_folder, device_map={"": "meta"})
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_what_the_system_says_is_no_fault_of_the_folder(
    copied: Path, plan_for: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails may be read another time. Mocked: no disk here fails on demand."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("dpo_assets.training.models.loading.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_base(copied, plan_for())
