"""Whether a release answers by its folder alone where its base did: tokenizer, template, turn ends, greedy tokens.

    python -m venv /somewhere/tf457
    /somewhere/tf457/bin/pip install "transformers==4.57.*" torch safetensors peft jinja2
    python -m benchmarks.load_back_files --python /somewhere/tf457/bin/python

Bases are the built-in model with tokenizers of the shapes that went wrong. Each is adapted and released twice, as a
merged model and as an adapter; both environments are asked the same by each release.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.load_back import there
from benchmarks.load_back_other import asked
from dpo_assets.assets.published_model import write_adapter
from dpo_assets.contract import TemplateSettings
from dpo_assets.publishing.commit import stage
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.models.merging import plan_merge, stream_merge
from dpo_assets.training.models.release_files import write_companions, write_config

TEXT = ["Hello, how are you doing?", "def f(x):\n    return x", "  two  spaces\n\n", "the quick brown fox"] * 20
MARKS = ("<s>", "</s>", "<|im_end|>")
ANSWER = "asked.json"


def byte_level(folder: Path, **config: Any) -> None:
    """A byte-level BPE in place of a base's tokenizer, the shape of GPT-2's, Llama-3's and DeepSeek's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [AddedToken(mark, special=True, normalized=False) for mark in MARKS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    inner.save(str(folder / "tokenizer.json"))
    values = {"bos_token": MARKS[0], "eos_token": MARKS[1], "pad_token": MARKS[1], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")


def saved_here(folder: Path) -> None:
    """A tokenizer with a further special token, as this environment's Transformers saves it."""
    byte_level(folder, tokenizer_class="PreTrainedTokenizerFast", additional_special_tokens=[MARKS[2]])
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.save_pretrained(folder)


BASES: dict[str, Callable[[Path], None]] = {
    "as it is": lambda folder: None,
    "PreTrainedTokenizerFast": lambda folder: byte_level(
        folder, tokenizer_class="PreTrainedTokenizerFast", model_input_names=["input_ids", "attention_mask"]
    ),
    "byte level under Llama's class": lambda folder: byte_level(folder, tokenizer_class="LlamaTokenizerFast"),
    "no class named": byte_level,
    "saved by 5": saved_here,
}


@dataclass(frozen=True)
class Row:
    """What one release was to both environments."""

    base: str
    artifact: str
    tokenizer_class: str
    here: dict[str, Any]
    there: dict[str, Any] | None
    why_not: str = ""

    @property
    def differs(self) -> list[str]:
        """What it is not the same in."""
        other = self.there or {}
        return [key for key, value in self.here.items() if other.get(key) != value]


def run(python: str, work: Path) -> tuple[str, list[Row]]:
    """(version of the other Transformers, rows)."""
    releases = {(name, kind): folder for name in BASES for kind, folder in released(name, work).items()}
    asked_there = {f"{name}, {kind}": folder for (name, kind), folder in releases.items()}
    version, failed = there(python, work, "ask", asked_there, ANSWER)
    rows = []
    for (name, kind), folder in releases.items():
        why_not = failed[f"{name}, {kind}"]
        told = None if why_not else json.loads((folder / ANSWER).read_text(encoding="utf-8"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        rows.append(Row(name, kind, config["tokenizer_class"], asked(folder), told, why_not))
    return version, rows


def released(name: str, work: Path) -> dict[str, Path]:
    """A base of this name, adapted, and staged both ways."""
    home = work / str(list(BASES).index(name))
    base, adapter, merged, patched = (home / part for part in ("base", "trained", "model", "patched"))
    shutil.copytree(Path(str(files("dpo_assets") / "data" / "stories260k")), base)
    BASES[name](base)
    torch.manual_seed(0)
    lm, _ = load_causal_lm(base, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(lm, config)
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(adapter))
    out = {kind: home / kind for kind in ("merged", "adapter")}
    for folder in (merged, patched, *out.values()):
        folder.mkdir()
    stream_merge(plan_merge(base, adapter), merged)
    write_config(base, merged)
    write_companions(base, merged, TemplateSettings())
    write_adapter(adapter, merged, patched, str(base), None)
    for kind, source in (("merged", merged), ("adapter", patched)):
        stage(source, out[kind], "# A release", {})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of an environment with an earlier Transformers")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="dpo-assets-load-back-") as work:
        version, rows = run(arguments.python, Path(work))
    print(f"here: transformers {transformers.__version__}; there: {version}\n")
    print("| tokenizer of the base | release | class in the release | differs there in |")
    print("|---|---|---|---|")
    for row in rows:
        told = f"not loaded: {row.why_not[:90]}" if row.why_not else ", ".join(row.differs) or "nothing"
        print(f"| {row.base} | {row.artifact} | {row.tokenizer_class} | {told} |")


if __name__ == "__main__":
    main()
