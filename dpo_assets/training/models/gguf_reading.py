"""A GGUF file read back: its settings, tokens and weights against those of the model that it was made of."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_assets.checks.reports import GgufNames, GgufWeights, NotMeasured
from dpo_assets.machine import memory_bytes
from dpo_assets.planning.weights import listed
from dpo_assets.publishing.ollama import Render
from dpo_assets.recipe import GgufType
from dpo_assets.training.models.chat_format import PROBES, RENDERING_ERRORS, TOKENIZER, ChatFormat
from dpo_assets.training.models.gguf_names import compare_by_name
from dpo_assets.training.models.gguf_rounding import rounding
from dpo_assets.training.models.gguf_settings import Settings
from dpo_assets.training.models.gguf_tokens import SentencePieces
from dpo_assets.training.models.loading import load_causal_lm

# Tokens that end an answer by their text alone, whatever a file says of them (llama.cpp, src/llama-vocab.cpp, b10605).
ENDS_BY_TEXT = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip
ENDS_BY_ID = ("eos_token_id", "eot_token_id", "eom_token_id")
MOST_TOKENS = 256  # Of a probe.
BYTES_A_VALUE = 12  # The merged model in fp32, the file's tensors in fp32, and the model that takes them.
SHARE = 0.8  # Of this process's memory.


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file as the package `gguf` reads it."""

    reader: GGUFReader

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        return cls(GGUFReader(path))

    def value(self, name: str) -> Any:
        """A field's value, None where the file has none."""
        field = self.reader.fields.get(name)
        return None if field is None else field.contents()

    def token_field(self, name: str) -> Any:
        return self.value(f"tokenizer.ggml.{name}")

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture"))

    @property
    def values(self) -> int:
        return sum(int(tensor.n_elements) for tensor in self.reader.tensors)

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp puts the BOS token before a text. Without a word of it, it does so for SentencePiece."""
        said = self.token_field("add_bos_token")
        return bool(said) if said is not None else self.token_field("model") == "llama"

    def not_finite(self) -> tuple[str, ...]:
        """Tensors with NaN or infinity."""
        return tuple(
            tensor.name
            for tensor in self.reader.tensors
            if not np.isfinite(dequantize(tensor.data, tensor.tensor_type)).all()
        )

    def names_compared(self, folder: Path, type_: GgufType) -> GgufNames | NotMeasured:
        """The merged model's tensors, one at a time."""
        blocks = int(self.value(f"{self.architecture}.block_count") or 0)
        return compare_by_name(self.reader, self.architecture, blocks, folder, type_)

    def settings(self, config: Any) -> Settings:
        """The file's settings beside those of a text config."""
        return Settings(
            lambda name: self.value(f"{self.architecture}.{name}"),
            {tensor.name for tensor in self.reader.tensors},
            config,
        )

    def tokens_that_differ(self, chat: ChatFormat, folder: Path) -> tuple[str, ...]:
        """What is not as in a model's tokenizer and chat template."""
        tokenizer, tokens = chat.tokenizer, self.token_field("tokens") or []
        said = []
        wrong = [
            number
            for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
            # The converter writes an added token as the tokenizer prints it.
            if number >= len(tokens) or (tokens[number] != token and tokens[number] != tokenizer.decode([number]))
        ]
        if wrong:
            said.append(f"{len(wrong)} tokens are others, the first of them {wrong[0]}")
        merges = _merges(folder) if self.token_field("model") == "gpt2" else None
        if merges is not None and list(self.token_field("merges") or []) != merges:
            said.append("other merges than tokenizer.json's")
        bos = self.token_field("bos_token_id")
        if bos is not None and tokenizer.bos_token_id is not None and bos != tokenizer.bos_token_id:
            said.append(f"BOS is token {bos}, not {tokenizer.bos_token_id}")
        if (pieces := self.sentence_pieces()) is not None:
            asked = chat.prompt_ids([{"role": "user", "content": PROBES[0]}])
            [prompt] = chat.texts([[{"role": "user", "content": PROBES[0]}]], answer_follows=True)
            texts = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES} | {prompt: asked}
            if others := [text for text, ids in texts.items() if pieces.read(text) != ids]:
                said.append(f"llama.cpp reads {len(others)} of {len(texts)} texts as other tokens, {others[0]!r} first")
        if self.value("tokenizer.chat_template") != tokenizer.get_chat_template():
            said.append("another chat template")
        return tuple(said)

    def sentence_pieces(self) -> SentencePieces | None:
        """llama.cpp's reading of texts, where the vocabulary is SentencePiece's.

        One of byte-level BPE is read by its merges, and by a way of splitting texts that the converter chooses by the
        ids of a probe text of its own, or refuses.
        """
        if self.token_field("model") != "llama":
            return None
        adds_space = self.token_field("add_space_prefix")
        return SentencePieces.of(
            self.token_field("tokens"),
            self.token_field("scores"),
            self.token_field("token_type"),
            True if adds_space is None else bool(adds_space),
        )

    def serving_differs(self, chat: ChatFormat) -> tuple[str, ...]:
        """What llama.cpp does otherwise than training did: a BOS token that prompts had not, answers that never end."""
        said = []
        bos = chat.tokenizer.bos_token
        [prompt] = chat.texts([[{"role": "user", "content": PROBES[0]}]], answer_follows=True)
        if self.adds_bos and bos and not prompt.startswith(bos):
            said.append(f"llama.cpp puts {bos} before a prompt, which the chat template does not")
        named = {self.token_field(name) for name in ENDS_BY_ID}
        texts = {end: chat.tokenizer.convert_ids_to_tokens(end) for end in sorted(chat.ends - named)}
        if unknown := [text for text in texts.values() if text not in ENDS_BY_TEXT]:
            said.append(f"llama.cpp does not know that {', '.join(unknown)} ends an answer: give it as a stop string")
        return tuple(said)


def _merges(folder: Path) -> list[str] | None:
    """The merges of tokenizer.json in the form of merges.txt; None without that file."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    merges = json.loads(path.read_text(encoding="utf-8"))["model"].get("merges") or []
    # A space inside a token is written as the byte-level alphabet writes it.
    return [one if isinstance(one, str) else " ".join(part.replace(" ", "\u0120") for part in one) for one in merges]


@torch.no_grad()
def compare_weights(
    path: Path, folder: Path, type_: GgufType, chat: ChatFormat, values: int
) -> GgufWeights | NotMeasured:
    """A file's weights, as Transformers reads them, against those of the merged model: on the CPU, in fp32.

    Both compute under the merged model's config, because Transformers' reader leaves settings of a file aside (rotary
    scaling, the width of a head); `settings` holds those against each other.

    Args:
        values: of the merged model, for what both will need of memory.
    """
    needed, there = values * BYTES_A_VALUE, SHARE * memory_bytes()
    if needed > there:
        return NotMeasured(not_measured=f"that takes {needed / 2**30:.0f} GiB of memory, {there / 2**30:.0f} are there")
    merged, _ = load_causal_lm(folder, dtype=torch.float32)
    merged.eval()
    probes = _probes(chat)
    expected = [_logprobs(merged, ids) for ids in probes]
    try:
        loaded, lacking = _load(path, merged)
        if lacking:
            return NotMeasured(not_measured=f"Transformers' reader finds no {listed(lacking)} in it")
        found = [_logprobs(loaded, ids) for ids in probes]
    # Whatever Transformers minds, or makes, of an architecture that its reader does not know.
    except Exception as error:
        return NotMeasured(not_measured=f"Transformers does not read it: {_first_line(error)}")
    divergence = [_kl(e, f) for e, f in zip(expected, found, strict=True)]
    same = [e.argmax(-1) == f.argmax(-1) for e, f in zip(expected, found, strict=True)]
    gaps = list(_gaps(merged, loaded, type_))
    return GgufWeights(
        tensors=len(gaps),
        differing=tuple(name for name, _, beyond in gaps if beyond),
        largest_difference=max(largest for _, largest, _ in gaps),
        kl_per_token=float(torch.cat(divergence).mean()),
        agreement=float(torch.cat(same).float().mean()),
        positions=sum(len(one) for one in same),
    )


def _load(path: Path, merged: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """The file as a model of the merged model's class; of the class that the file names where its reader wants that.

    And the tensors that were not found, which Transformers draws at random: Mixtral's experts have names in the file
    that its reader does not know. Whether they are there, is told by their names and by the number of values.
    """
    how: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32, "local_files_only": True}
    how["output_loading_info"] = True
    try:
        own = copy.deepcopy(merged.config)
        loaded, told = type(merged).from_pretrained(path.parent, config=own, trust_remote_code=False, **how)
    except NotImplementedError:  # Mistral's models are Llama's to llama.cpp.
        from transformers import AutoModelForCausalLM

        loaded, told = AutoModelForCausalLM.from_pretrained(path.parent, trust_remote_code=False, **how)
    model: PreTrainedModel = loaded.eval()
    return model, sorted(told["missing_keys"])


def _gaps(merged: PreTrainedModel, loaded: PreTrainedModel, type_: GgufType) -> Iterator[tuple[str, float, bool]]:
    """(tensor, largest difference, whether rounding does not explain it) of every tensor of either model."""
    ours, theirs = merged.state_dict(), loaded.state_dict()
    crosswise = {f"{name}.weight" for name, module in merged.named_modules() if isinstance(module, Conv1D)}
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            yield name, math.inf, True
            continue
        one, other = ours[name].float(), theirs[name].float()
        if name in crosswise:  # Stored by llama.cpp as linear layers are.
            one, other = one.T, other.T
        gap = (one - other).abs()
        # NaN is not within anything.
        yield name, float(gap.max()), not bool((gap <= rounding(one, type_)).all())


def _probes(chat: ChatFormat) -> list[Tensor]:
    """Token ids of plain texts, and of one question as the chat template asks it."""
    texts = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    asked = chat.prompt_ids([{"role": "user", "content": PROBES[0]}])
    return [torch.tensor([ids[:MOST_TOKENS]]) for ids in (*texts, asked) if ids]


def _logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """(positions, vocabulary)."""
    return torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)


def _kl(expected: Tensor, found: Tensor) -> Tensor:
    return (expected.exp() * (expected - found)).sum(-1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def renderer(chat: ChatFormat) -> Render:
    """The chat template as `publishing.ollama` asks it."""

    def render(messages: Sequence[Mapping[str, str]], answer_follows: bool) -> str:
        try:
            [text] = chat.texts([messages], answer_follows=answer_follows)
        except RENDERING_ERRORS as error:
            raise ValueError(str(error)) from None
        return text

    return render
