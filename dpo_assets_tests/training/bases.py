"""Small bases with one property changed: copies of the embedded model, and tokenizers made for a fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM

TEXT = ["Hello, how are you doing?", "def f(x):\n    return x", "  two  spaces\n\n", "the quick brown fox"] * 20


def copy_of(folder: Path, target: Path) -> Path:
    """A base that may be damaged."""
    return Path(shutil.copytree(folder, target))


def rewrite(path: Path, **changes: Any) -> None:
    """A JSON file with keys changed; None takes a key away."""
    values: dict[str, Any] = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """The base's tensors changed, in its one file."""
    path = folder / "model.safetensors"
    save_file(dict(change(load_file(path))), path, {"format": "pt"})


def sharded(folder: Path, target: Path, size: str) -> Path:
    """A base in files of at most `size`."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size=size)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    return target


def byte_level(folder: Path, marks: tuple[str, ...] = ("<s>", "</s>"), **config: Any) -> Path:
    """The tokenizer of a base replaced by a byte-level BPE, the shape of GPT-2's, Llama-3's and DeepSeek's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(TEXT, trainer)
    inner.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": marks[0], "eos_token": marks[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": marks[1], **values, **config}))
    return folder
