"""One reading of the tokenizer, one rendering of the template, one set of tokens that end a turn."""

from __future__ import annotations

import ast
import json
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_assets.contract import TemplateSettings
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import TEMPLATE_DATE
from dpo_assets.training.models.chat_format import (
    MOST_MARKS,
    ChatFormat,
    _difference,
    _marks,
    load_chat_format,
    load_tokenizer,
    write_tokenizer,
)
from dpo_assets_tests.training.bases import byte_level, copy_of, rewrite

SENTENCE = "Hello, how are you doing?\n\n  x"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "Is it so?"}]


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return copy_of(model_folder, tmp_path / "base")


def ids(tokenizer: Any, text: str = SENTENCE) -> list[int]:
    read: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return read


def test_a_byte_level_tokenizer_under_llamas_class_keeps_its_spaces(copied: Path, tmp_path: Path) -> None:
    """DeepSeek-R1-Distill-Llama and deepseek-coder have this shape; Transformers 5 replaces their pre-tokenizer."""
    byte_level(copied, tokenizer_class="LlamaTokenizerFast")
    as_named = AutoTokenizer.from_pretrained(copied, local_files_only=True, trust_remote_code=False)
    exact = Tokenizer.from_file(str(copied / "tokenizer.json")).encode(SENTENCE, add_special_tokens=False).ids
    assert ids(as_named) != exact, "the fault is gone from Transformers: its class may be taken at its word"
    tokenizer = load_tokenizer(copied)
    assert ids(tokenizer) == exact
    assert tokenizer.decode(exact) == SENTENCE
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == (copied / "chat_template.jinja").read_text()

    released = tmp_path / "released"
    released.mkdir()
    write_tokenizer(copied, released)
    assert json.loads((released / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "ByteLevel"
    assert (released / "tokenizer.json").read_bytes() == (copied / "tokenizer.json").read_bytes()
    (released / "config.json").write_text((copied / "config.json").read_text())
    assert ids(AutoTokenizer.from_pretrained(released, local_files_only=True, trust_remote_code=False)) == exact


def test_a_tokenizer_is_released_under_the_class_that_its_base_names(copied: Path, tmp_path: Path) -> None:
    byte_level(copied)
    before = json.loads((copied / "tokenizer_config.json").read_text())
    write_tokenizer(copied, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == before


def test_a_class_that_only_one_version_knows_is_not_released(model_folder: Path, tmp_path: Path) -> None:
    write_tokenizer(model_folder, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only"} & set(config)
    assert ids(load_tokenizer(tmp_path)) == ids(load_tokenizer(model_folder))


def test_a_tokenizer_class_that_does_not_exist_is_read_as_the_file_stands(copied: Path) -> None:
    byte_level(copied, tokenizer_class="MyOwnTokenizer")
    assert load_tokenizer(copied).decode(ids(load_tokenizer(copied))) == SENTENCE


def test_a_tokenizer_that_no_way_of_loading_reads_as_its_file_is_refused(copied: Path) -> None:
    """A word that the config makes a token of, and the file does not."""
    word = {"content": "are", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    byte_level(copied, added_tokens_decoder={"400": word | {"special": False}})
    with pytest.raises(ConfigError, match=r"cannot be loaded as its files describe it: .* reads 'Hello, how are"):
        load_tokenizer(copied)


IM = {"content": "<|im_end|>", "lstrip": False, "single_word": False, "normalized": False, "special": True}


@pytest.mark.parametrize("rstrip", [True, False])
def test_where_only_flags_of_a_mark_differ_the_tokenizers_config_is_followed(copied: Path, rstrip: bool) -> None:
    """As vLLM and TGI do. The file says that the mark does not take the line end behind it (Phi-3's does)."""
    byte_level(copied, ("<s>", "</s>", "<|im_end|>"), added_tokens_decoder={"2": IM | {"rstrip": rstrip}})
    read = ids(load_tokenizer(copied), "a <|im_end|>\n b")
    assert (read == ids(load_tokenizer(copied), "a <|im_end|> b")) is rstrip


def test_white_space_beside_a_mark_is_compared(copied: Path) -> None:
    byte_level(copied, ("<s>", "</s>", "<|im_end|>"), added_tokens_decoder={"2": IM | {"rstrip": True}})
    plain = Tokenizer.from_file(str(copied / "tokenizer.json"))
    assert "reads 'a <|im_end|>\\n b' as" in str(_difference(load_tokenizer(copied), plain))


def test_the_marks_of_the_template_are_compared_first_and_all(copied: Path) -> None:
    """A tokenizer may have thousands of added tokens before those that every text has."""
    marks = ("<s>", "</s>", *(f"<|{n}|>" for n in range(99)), "<|im_start|>", "<|im_end|>")
    byte_level(copied, marks)
    (copied / "chat_template.jinja").write_text(CHATML)
    found = _marks(load_tokenizer(copied), Tokenizer.from_file(str(copied / "tokenizer.json")))
    assert found[:2] == ["<|im_start|>", "<|im_end|>"]
    assert len(found) == 2 + MOST_MARKS


def test_a_tokenizer_that_fails_on_a_text_is_refused_and_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise TypeError("no such text")

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", fail)
    with pytest.raises(ConfigError, match=r"cannot be loaded as its files describe it: TypeError: no such text"):
        load_tokenizer(copied)


def test_a_template_that_finds_no_key_is_refused_as_one_that_refuses(copied: Path) -> None:
    """What Python says of a message of an odd shape is a refusal of the template's too."""
    (copied / "chat_template.jinja").write_text("{{ '{a}'.format(b=1) }}")
    with pytest.raises(ConfigError, match="cannot render a question"):
        load_chat_format(copied)


@pytest.mark.parametrize("content", ["{", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused_by_name(copied: Path, content: str) -> None:
    (copied / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is no tokenizer that can be read"):
        load_tokenizer(copied)


@pytest.mark.parametrize(
    ("generation", "config", "template", "ends"),
    [
        (None, None, CHATML, {1, 3}),
        (4, None, CHATML, {1, 3, 4}),
        ([1, 4], 2, CHATML, {1, 2, 3, 4}),
        (None, None, "{% for m in messages %}{{ m.content }}\n{% endfor %}", {1}),
        # A turn's beginning is no end, and words behind an answer are no mark.
        (None, None, CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }} so <|im_end|>"), {1}),
    ],
    ids=["template", "generation config too", "all", "tokenizer alone", "words behind the answer"],
)
def test_a_turn_ends_at_any_token_that_a_file_or_the_template_names(
    copied: Path, generation: Any, config: Any, template: str, ends: set[int]
) -> None:
    """Gemma's, Phi-3's and Llama-3's templates end a turn with another token than the tokenizer's EOS."""
    byte_level(copied, ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>"))
    rewrite(copied / "generation_config.json", eos_token_id=generation)
    rewrite(copied / "config.json", eos_token_id=config)
    (copied / "chat_template.jinja").write_text(template)
    assert load_chat_format(copied).ends == ends


DATED = "Today: {{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("day", [None, date(2024, 7, 26)])
def test_a_template_that_prints_today_is_told_the_recipes_day(tokenizer: Any, day: date | None) -> None:
    """Pairs tokenized on two days must not differ, nor two runs of equal inputs."""
    chat = ChatFormat(tokenizer, TemplateSettings() if day is None else TemplateSettings(day=day))
    before = tokenizer.chat_template
    tokenizer.chat_template = DATED
    try:
        told = [
            *chat.texts([QUESTION], answer_follows=True),
            chat.rendering_tokenizer().apply_chat_template(QUESTION, tokenize=False),
        ]
    finally:
        tokenizer.chat_template = before
    assert told == [f"Today: {day or TEMPLATE_DATE:%d %b %Y}Is it so?"] * 2
    assert date.today() != TEMPLATE_DATE


def test_arguments_of_the_template_reach_every_rendering(copied: Path) -> None:
    thinking = "{% if enable_thinking is defined and not enable_thinking %}<s></s>{% endif %}"
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}" + thinking)
    plain, quiet = (load_chat_format(copied, TemplateSettings(arguments=a)) for a in ({}, {"enable_thinking": False}))
    assert plain.texts([QUESTION], answer_follows=True) == ["Is it so?"]
    assert quiet.texts([QUESTION], answer_follows=True) == ["Is it so?<s></s>"]
    assert quiet.prompt_ids(QUESTION) == [*plain.prompt_ids(QUESTION), 1, 2]
    assert quiet.rendering_tokenizer().apply_chat_template(QUESTION, tokenize=False) == "Is it so?<s></s>"


def test_named_templates_without_a_default_one_are_refused_with_the_way_out(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    named = [{"name": name, "template": "{{ messages[0].content }}"} for name in ("rag", "tool_use")]
    rewrite(copied / "tokenizer_config.json", chat_template=named)
    with pytest.raises(ConfigError, match=r"base_model\.chat_template"):
        load_chat_format(copied)
    named[0]["name"] = "default"
    rewrite(copied / "tokenizer_config.json", chat_template=named)
    assert load_chat_format(copied).texts([QUESTION], answer_follows=True) == ["Is it so?"]


def calls_that_load() -> list[tuple[str, ast.Call]]:
    """Every call of a `from_pretrained` in the package, with its place."""
    package = Path(str(files("dpo_assets")))
    return [
        (f"{path.relative_to(package)}:{node.lineno} {ast.unparse(node.func)}", node)
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]


def test_no_load_runs_code_of_a_model() -> None:
    calls = [(place, call) for place, call in calls_that_load() if not place.endswith("PeftModel.from_pretrained")]
    assert len(calls) >= 5
    for place, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        refused = given.get("trust_remote_code")
        assert isinstance(refused, ast.Constant), place
        assert refused.value is False, place
