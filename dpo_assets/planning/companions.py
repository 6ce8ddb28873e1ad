"""The files that belong to a model beside its weights, by name: what a base is fetched with, what a release keeps.

Names are paths inside the model's folder or repository, with `/` between their parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from dpo_assets.disk import copy_file

TOKENIZER_CONFIG, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
PROCESSOR_CONFIG = "processor_config.json"
LEGACY_TEMPLATE = "chat_template.json"  # A processor's, of Transformers before 4.50.
NAMED_TEMPLATES = "additional_chat_templates"  # Where Transformers keeps further templates: `tool_use`, `rag`.
CARD = "README.md"
# Files of a tokenizer, as the Hub's models have them: Transformers' own names (`vocab_files_names` of its classes),
# Mistral's (tekken.json, tokenizer.model.v3) and tiktoken's.
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, TEMPLATE, f"{NAMED_TEMPLATES}/*.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "bpe.codes", "tokenizer.model",
    "tokenizer.model.v[0-9]", "tokenizer.model.v[0-9][0-9]", "spiece.model", "sentencepiece.bpe.model", "spm.model",
    "tekken.json", "tiktoken.model", "*.tiktoken",
)  # fmt: skip
# Files by which a model of more than text reads images, video and sound.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    PROCESSOR_CONFIG,
    "video_preprocessor_config.json",
    LEGACY_TEMPLATE,
)
# What a run needs of a folder beside those, to read it: config, index, card.
_READ = ("*.json", "*.jinja", "*.model", "*.txt", CARD)
# Texts that a licence asks to hand on, by a word of their name: LICENSE.txt, MODEL_LICENSE, USE_POLICY.md (Llama),
# USAGE_POLICY (gpt-oss), ACCEPTABLE_USE_POLICY (Falcon), THIRD_PARTY_NOTICES, "Community License for ... Model.pdf".
_LEGAL = re.compile(
    r"(?<![a-z])(licen[cs]es?|notices?|copying|copyright|us(e|age)[ _-]?polic(y|ies)|terms[ _-]of[ _-]use)(?![a-z])",
    re.IGNORECASE,
)
# Of a text, and of nothing that could be run: `LICENSE-2.0` has none of letters.
_NO_TEXT = re.compile(r"\.(?!(txt|md|rst|pdf|html?)$)[a-z_]\w*$", re.IGNORECASE)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file decides how messages become tokens: vocabulary, special tokens, chat templates."""
    return _matches(name, TOKENIZER_FILES)


def is_licence_file(name: str) -> bool:
    """Whether a file at the top of a repository holds terms that go wherever the model goes, whatever its case."""
    return "/" not in name and _LEGAL.search(name) is not None and _NO_TEXT.search(name) is None


def is_released(name: str) -> bool:
    """Whether a file of a base goes into its releases."""
    return is_tokenizer_file(name) or is_licence_file(name) or _matches(name, PROCESSOR_FILES) or name == GENERATION


def is_kept(name: str) -> bool:
    """Whether a file of a base is fetched or copied, beside its weights."""
    return is_released(name) or _matches(name, _READ)


def found(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    """The names of a folder's files that are wanted, in order. Links to files count, as the Hub's cache has them."""
    files = [path for inside in (folder, folder / NAMED_TEMPLATES) if inside.is_dir() for path in inside.iterdir()]
    names = (path.relative_to(folder).as_posix() for path in files if path.is_file())
    return sorted(name for name in names if wanted(name))


def copy_files(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Copies what is wanted, byte for byte."""
    for name in found(source, wanted):
        (target / name).parent.mkdir(exist_ok=True)
        copy_file(source / name, target / name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits a pattern; `*` of a pattern goes through no folder."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
