"""A base's tokenizer and chat template as every stage uses them: one reading, one rendering, one set of turn ends."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_assets.artifact import read_object
from dpo_assets.contract import TemplateSettings
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.quality_tokens import read_markers
from dpo_assets.planning.companions import TOKENIZER_CONFIG, copy_files, is_tokenizer_file

TOKENIZER = "tokenizer.json"
# Texts on which two readings of one tokenizer.json part: spaces, line ends, code, numbers, letters of many scripts.
PROBES = (
    "Hello, how are you doing?",
    "  two  spaces\n\n\ta tab, and a line end \r\n",
    "def f(x):\n    return [x[1:], 'a' + \"b\"]  # 3.14 1,000",
    "caf\u00e9 na\u00efve e\u0301 \u00bd \ufb01 \u0434\u0430 \u65e5\u672c\u8a9e \U0001f642",
    "I'LL say it's what we'd don't",
)
MOST_MARKS = 64  # Added tokens that no template uses and that are tried all the same; there may be thousands.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # Of an added token.
# What a template raises: its own refusals, and what Python says when it handles values of an odd shape.
RENDERING_ERRORS = (TemplateError, TypeError, ValueError, KeyError)
# The class that reads tokenizer.json as it stands. Transformers 4 and 5, vLLM and TGI know it by this name.
GENERIC_CLASS = "PreTrainedTokenizerFast"
TRANSFORMERS_5_CLASS = "TokenizersBackend"  # The same class, under the name that 5 writes and 4 does not know.
ONLY_IN_5 = frozenset({"backend", "is_local", "local_files_only"})  # Keys of tokenizer_config.json.

Conversation = Sequence[Mapping[str, Any]]


class ChatFormat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        template: what every rendering gets beside the messages.
        named_ends: ids that the model's files name as EOS.
    """

    def __init__(
        self, tokenizer: Any, template: TemplateSettings | None = None, named_ends: Iterable[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        settings = template or TemplateSettings()
        midnight = datetime.combine(settings.day, time())
        # The template's own `strftime_now` is a global, which an argument of this name goes before.
        self._arguments = {**settings.arguments, "strftime_now": midnight.strftime}
        self._named_ends = frozenset(named_ends)

    def texts(
        self, conversations: Sequence[Conversation], *, answer_follows: bool, tools: list[Any] | None = None
    ) -> list[str]:
        """Conversations as text; `answer_follows` opens the assistant's turn.

        Raises:
            TemplateError, TypeError, ValueError, KeyError: the chat template refuses one of them (RENDERING_ERRORS).
        """
        if not conversations:
            return []
        texts: list[str] = self.tokenizer.apply_chat_template(
            [list(one) for one in conversations],
            tools=tools,
            tokenize=False,
            add_generation_prompt=answer_follows,
            **self._arguments,
        )
        return texts

    def prompt_ids(self, messages: Conversation, tools: list[Any] | None = None) -> list[int]:
        """Token ids of a conversation whose next turn is the assistant's."""
        [text] = self.texts([messages], answer_follows=True, tools=tools)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def rendering_tokenizer(self) -> Any:
        """The tokenizer for a trainer that renders conversations itself: its template gets the same arguments."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.apply_chat_template = partial(self.tokenizer.apply_chat_template, **self._arguments)
        return tokenizer

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end an assistant's turn: all that the tokenizer, the generation config, the model's config or the
        chat template names. Gemma's, Phi-3's and Llama-3's templates end a turn with another token than EOS."""
        ends = {self.tokenizer.eos_token_id, self._template_end, *self._named_ends}
        return frozenset(end for end in ends if end is not None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens: marks of turns and texts, which no answer should hold."""
        return frozenset(n for n, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    @cached_property
    def _template_end(self) -> int | None:
        """The special token that the template puts behind an answer, or None."""
        answer = "Yes."
        try:
            [text] = self.texts(
                [[{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": answer}]],
                answer_follows=False,
            )
        except RENDERING_ERRORS:
            return None
        tail = text.rpartition(answer)[2].lstrip()
        ids: list[int] = self.tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
        mark = next((n for n in ids if n in self.special_ids), None)
        return mark if mark is not None and tail.startswith(self.tokenizer.convert_ids_to_tokens(mark)) else None


def load_chat_format(folder: Path, template: TemplateSettings | None = None) -> ChatFormat:
    """The chat format of a base model.

    Raises:
        ConfigError: as `load_tokenizer`; where nothing ends a turn; where the template cannot be rendered at all.
    """
    tokenizer = load_tokenizer(folder)
    chat = ChatFormat(tokenizer, template, read_markers(folder).ends)
    try:
        chat.texts([[{"role": "user", "content": "Is it so?"}]], answer_follows=True)
    except RENDERING_ERRORS as error:
        # Several named templates without a default one are a ValueError.
        raise ConfigError(
            f"the chat template in {folder} cannot render a question: {error}. "
            "Set base_model.chat_template to a Jinja file that can."
        ) from None
    if not chat.ends:
        raise ConfigError(
            f"nothing ends an answer of the model in {folder}: neither tokenizer, generation_config.json, config.json "
            "nor the chat template names an EOS token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(min(chat.ends))
    return chat


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, whose ids are those of its own tokenizer.json.

    Transformers builds the tokenizer that the class in tokenizer_config.json or the model's type stands for. Where that
    is another than tokenizer.json describes (a byte-level BPE under the name of Llama's class lost its spaces), the
    file is read as it stands.

    Raises:
        ConfigError: when no way of loading it gives the ids of tokenizer.json.
    """
    return _read(folder)[0]


def write_tokenizer(base: Path, folder: Path) -> None:
    """The base's own tokenizer files, byte for byte; tokenizer_config.json anew only where others could not read it.

    Raises:
        ConfigError: as `load_tokenizer`.
    """
    tokenizer, as_named = _read(base)
    copy_files(base, folder, is_tokenizer_file)
    config = read_object(base / TOKENIZER_CONFIG)
    read_as = type(tokenizer).__name__ if as_named else GENERIC_CLASS
    written = _for_every_reader(config, read_as, tokenizer.model_input_names)
    if written != config:
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def _for_every_reader(config: Mapping[str, Any], read_as: str, inputs: Sequence[str]) -> dict[str, Any]:
    """A tokenizer_config.json that Transformers 4.57 and what builds on it read as it was read here.

    Transformers 5 writes classes that no other version knows, how the folder was once loaded, and a list in a place
    where 4.57 expects names with values (read of 4.57.6: it fails on `extra_special_tokens.keys()`). A config without a
    class leaves it to config.json, which stands beside no adapter.

    Args:
        read_as: the class that gives the ids of tokenizer.json.
        inputs: what it gives a model. The class that is written gives more by itself in 4.57, which `generate` refuses.
    """
    written = {name: value for name, value in config.items() if name not in ONLY_IN_5}
    named = read_as if read_as == GENERIC_CLASS else written.get("tokenizer_class") or read_as
    written["tokenizer_class"] = GENERIC_CLASS if named == TRANSFORMERS_5_CLASS else named
    if written["tokenizer_class"] == GENERIC_CLASS != config.get("tokenizer_class"):
        written.setdefault("model_input_names", list(inputs))
    if isinstance(extra := written.get("extra_special_tokens"), list):
        del written["extra_special_tokens"]
        written["additional_special_tokens"] = (written.get("additional_special_tokens") or []) + extra
    return written


def _read(folder: Path) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer, and whether it is the one that its files name."""
    ways = (_as_named, _as_it_stands) if (folder / TOKENIZER).is_file() else (_as_named,)
    exact = _exact(folder) if len(ways) > 1 else None
    said = []
    for way in ways:
        try:
            tokenizer = way(folder)
            difference = None if exact is None else _difference(tokenizer, exact)
        # Readers of tokenizers raise Exception itself for a file, or a text, that they do not understand.
        except Exception as error:
            difference = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if difference is None:
                return tokenizer, way is _as_named
        said.append(difference)
    raise ConfigError(f"the tokenizer in {folder} cannot be loaded as its files describe it: {'; '.join(said)}")


def _as_named(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _as_it_stands(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _exact(folder: Path) -> Tokenizer:
    """What tokenizer.json describes, its added tokens with the flags that tokenizer_config.json gives them.

    Where the two differ, Transformers, vLLM and TGI all follow the config.
    """
    path = folder / TOKENIZER
    try:
        exact = Tokenizer.from_file(str(path))
        stored = exact.get_added_tokens_decoder()
        for number, token in _configured(folder / TOKENIZER_CONFIG).items():
            if number in stored and stored[number].content == token.content and _flags(stored[number]) != _flags(token):
                (exact.add_special_tokens if token.special else exact.add_tokens)([token])
    except Exception as error:
        raise ConfigError(f"{path} is no tokenizer that can be read: {error}") from None
    exact.no_padding()
    exact.no_truncation()
    return exact


def _configured(path: Path) -> dict[int, AddedToken]:
    """The added tokens of a tokenizer_config.json by their ids."""
    said = read_object(path).get("added_tokens_decoder") or {}
    return {
        int(number): AddedToken(**{name: row[name] for name in ("content", *FLAGS) if name in row})
        for number, row in said.items()
    }


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return tuple(getattr(token, name) for name in FLAGS)


def _marks(tokenizer: Any, exact: Tokenizer) -> list[str]:
    """Added tokens to try: those of the chat template, which every text has, then the first of the others."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template or "")
    marks = [token.content for _, token in sorted(exact.get_added_tokens_decoder().items())]
    used = [mark for mark in marks if mark in text]
    return used + [mark for mark in marks if mark not in text][:MOST_MARKS]


def _difference(tokenizer: Any, exact: Tokenizer) -> str | None:
    """The first text for which a tokenizer gives other ids, or another text back, than tokenizer.json; None: none."""
    marks = _marks(tokenizer, exact)
    # White space beside a mark is the mark's own where its flags say so (`rstrip`).
    for text in (*PROBES, *marks, *(form.replace("@", mark) for mark in marks for form in ("a@b", "a @\n b"))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = exact.encode(text, add_special_tokens=False).ids
        if ids != wanted:
            return f"{type(tokenizer).__name__} reads {text!r} as {ids[:8]}, tokenizer.json as {wanted[:8]}"
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back != exact.decode(ids, skip_special_tokens=False):
            return f"{type(tokenizer).__name__} decodes the tokens of {text!r} as {back!r}"
    return None
