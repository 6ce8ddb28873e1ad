"""What a release holds beside its weights: the base's own files, byte for byte wherever others can read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_assets.assets.published_model import write_adapter
from dpo_assets.contract import TemplateSettings
from dpo_assets.planning.companions import NAMED_TEMPLATES, found
from dpo_assets.publishing.commit import stage, staged_files
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.models.release_files import write_companions, write_config
from dpo_assets_tests.training.bases import byte_level, copy_of, rewrite

SENTENCE = "Hello, how are you doing?"
WORDS = [{"role": "user", "content": SENTENCE}]
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    """A byte-level base with all that repositories put beside weights, and generation defaults that end every turn."""
    folder = byte_level(copy_of(model_folder, tmp_path / "base"))
    rewrite(folder / "generation_config.json", eos_token_id=[1, 0], temperature=0.7)
    rewrite(folder / "config.json", eos_token_id=[0, 1])
    (folder / NAMED_TEMPLATES).mkdir()
    texts = {
        "LICENSE.txt": "Terms,\r\nwith line ends of another system.",
        "NOTICE": "Notices",
        "Use_Policy.md": "# Policy",
        "tokenizer.model": "as it is",
        "special_tokens_map.json": '{"eos_token":   "</s>"}',
        "preprocessor_config.json": "{}",
        f"{NAMED_TEMPLATES}/tool_use.jinja": "{% for t in tools %}{{ t.function.name }}{% endfor %}" + SENTENCE,
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    return folder


def released(base: Path) -> Path:
    folder = base.parent / "released"
    folder.mkdir()
    write_companions(base, folder, TemplateSettings())
    return folder


def test_the_bases_own_files_are_released_byte_for_byte(base: Path) -> None:
    model = released(base)
    own = set(found(base, lambda _: True)) - {"model.safetensors", "config.json"}
    assert set(found(model, lambda _: True)) == own
    assert [name for name in sorted(own) if (model / name).read_bytes() != (base / name).read_bytes()] == []


def test_a_released_tokenizer_renders_by_its_named_templates_too(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(released(base), local_files_only=True, trust_remote_code=False)
    assert tokenizer.apply_chat_template(WORDS, tools=[TOOL], tokenize=False) == f"look{SENTENCE}"
    assert (
        tokenizer.apply_chat_template(WORDS, tokenize=False)
        == load_chat_format(base).texts([WORDS], answer_follows=False)[0]
    )


def test_a_byte_level_base_under_llamas_class_is_released_with_its_own_ids(base: Path) -> None:
    rewrite(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    model = released(base)
    assert (model / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    exact = Tokenizer.from_file(str(base / "tokenizer.json")).encode(SENTENCE, add_special_tokens=False).ids
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    assert tokenizer(SENTENCE, add_special_tokens=False)["input_ids"] == exact
    assert tokenizer.decode(exact) == SENTENCE
    # 4.57 gives token types by itself under this class, and `generate` refuses them.
    said = json.loads((model / "tokenizer_config.json").read_text())["model_input_names"]
    assert said == ["input_ids", "attention_mask"] == sorted(tokenizer(SENTENCE), reverse=True)


def test_a_tokenizer_that_transformers_5_saved_is_released_as_4_reads_it(base: Path, tmp_path: Path) -> None:
    """4.57 knows neither the class nor a list of extra tokens: it looks for their keys, and fails."""
    byte_level(base, ("<s>", "</s>", "<|im_end|>"), additional_special_tokens=["<|im_end|>"])
    rewrite(base / "generation_config.json", eos_token_id=[0, 1])
    AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False).save_pretrained(base)
    saved = json.loads((base / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend"
    assert saved["extra_special_tokens"] == ["<|im_end|>"], "Transformers writes another form now"
    model = released(base)
    config = json.loads((model / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & config.keys()
    assert config["additional_special_tokens"] == ["<|im_end|>"]
    before, after = (
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for folder in (base, model)
    )
    assert before.all_special_tokens == after.all_special_tokens
    assert before("a<|im_end|> b")["input_ids"] == after("a<|im_end|> b")["input_ids"]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"pad_token_id": 0, "bos_token_id": 0}, {"pad_token_id": 0, "bos_token_id": 0}),
        ({"pad_token_id": None, "bos_token_id": 0}, {"bos_token_id": 0}),
        (
            {"pad_token_id": None, "bos_token_id": None, "text_config": {"pad_token_id": 0, "bos_token_id": 2}},
            {"pad_token_id": 0, "bos_token_id": 2},
        ),
    ],
    ids=["both", "one", "of the text part"],
)
def test_ids_of_zero_are_ids_where_the_base_has_no_generation_defaults(
    base: Path, config: dict[str, Any], kept: dict[str, int]
) -> None:
    (base / "generation_config.json").unlink()
    rewrite(base / "config.json", **config)
    assert json.loads((released(base) / "generation_config.json").read_text()) == kept | {"eos_token_id": [0, 1]}


def test_generation_defaults_that_would_not_end_a_turn_are_mended_and_else_kept(base: Path) -> None:
    rewrite(base / "generation_config.json", eos_token_id=1, _from_model_config=True)
    before = json.loads((base / "generation_config.json").read_text())
    del before["_from_model_config"]  # It would let Transformers go back to the ids of config.json.
    after = json.loads((released(base) / "generation_config.json").read_text())
    assert after == before | {"eos_token_id": [0, 1]}


@pytest.mark.parametrize("named", [True, False], ids=["class named", "class left to the model's type"])
def test_an_adapter_release_is_loaded_with_tokenizer_template_and_turn_ends(base: Path, named: bool) -> None:
    """By its folder alone, as its repository would be; PEFT puts it on the base that it names."""
    if not named:
        rewrite(base / "tokenizer_config.json", tokenizer_class=None)
    merged, adapter = released(base), base.parent / "adapter"
    torch.manual_seed(0)
    trained = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    trained.save_pretrained(str(adapter))
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="/home/someone/model")
    folders = base.parent / "patched", base.parent / "staged"
    for folder in folders:
        folder.mkdir()
    write_adapter(adapter, merged, folders[0], str(base), None)
    stage(folders[0], folders[1], "# Card", {})
    beside = set(found(merged, lambda _: True))
    own = {"adapter_config.json", "adapter_model.safetensors", "README.md", "provenance.json"}
    assert set(staged_files(folders[1])) == beside | own
    assert {"LICENSE.txt", "NOTICE", "Use_Policy.md", "generation_config.json", "tokenizer.json"} < beside
    # 4.57 looks for a config.json where no class is named.
    said = json.loads((folders[1] / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"

    tokenizer = AutoTokenizer.from_pretrained(folders[1], local_files_only=True, trust_remote_code=False)
    text = tokenizer.apply_chat_template(WORDS, tokenize=False)
    assert text == AutoTokenizer.from_pretrained(base).apply_chat_template(WORDS, tokenize=False)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folders[1], local_files_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained.eval()(ids).logits)


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1]}
KINDS = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}


@pytest.mark.parametrize(
    ("stated", "added"),
    [
        ({"rope_parameters": PARTIAL}, {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        (
            {"rope_parameters": YARN},
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
        ),
        (
            {"rope_parameters": MROPE},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
        ),
        ({"rope_parameters": YARN, "rope_theta": 5e5, "rope_scaling": YARN}, {}),
        ({"rope_parameters": KINDS}, {}),
        ({"rope_parameters": None, "rope_theta": 3e5}, {}),
        ({"rope_parameters": None, "_name_or_path": "/home/someone/model"}, {"_name_or_path": None}),
    ],
    ids=[
        "a share of the heads",
        "scaled",
        "sections",
        "both said",
        "a kind of layer each",
        "as 4 wrote it",
        "where it once lay",
    ],
)
def test_a_config_that_transformers_5_saved_says_its_rotary_base_for_4_too(
    base: Path, stated: dict[str, Any], added: dict[str, Any]
) -> None:
    """4.57 takes the default base without a word: the release was another model there, and its base as well."""
    rewrite(base / "config.json", **stated)
    target = base.parent / "target"
    target.mkdir()
    write_config(base, target)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, target))
    assert after == {name: value for name, value in (before | added).items() if value is not None}
    if not added:
        assert (target / "config.json").read_bytes() == (base / "config.json").read_bytes()
    if "_name_or_path" not in stated:
        read = [AutoConfig.from_pretrained(folder).rope_parameters for folder in (base, target)]
        assert read[0] == read[1]


def test_a_text_part_says_its_rotary_base_for_4_too(base: Path) -> None:
    (base / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": PARTIAL}, "vision_config": {}}))
    target = base.parent / "target"
    target.mkdir()
    write_config(base, target)
    text = json.loads((target / "config.json").read_text())["text_config"]
    assert text == {"rope_parameters": PARTIAL, "rope_theta": 1e6, "partial_rotary_factor": 0.5}
