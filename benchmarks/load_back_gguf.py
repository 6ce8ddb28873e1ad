"""Whether a GGUF file answers in llama.cpp itself as the merged model does in Transformers.

    python -m venv /somewhere/llama
    /somewhere/llama/bin/pip install llama-cpp-python
    python -m benchmarks.load_back_gguf --python /somewhere/llama/bin/python [--model FOLDER ...]

Files are written and read back by the worker's own stage (extra `gguf`), then loaded by llama.cpp in the other
environment: token ids of probe texts, the greedy answer to a question as the chat template asks it, and the
log-probabilities of every position of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks import load_back_gguf_other
from dpo_assets.checks.gguf import gguf_verdicts
from dpo_assets.checks.reports import GgufReport
from dpo_assets.contract import GGUF_FOLDER, GgufSpec
from dpo_assets.recipe import GgufType
from dpo_assets.training.models.chat_format import PROBES, ChatFormat, load_chat_format
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.stages import gguf

STORIES = Path(str(files("dpo_assets") / "data" / "stories260k"))
ANSWER = 24  # Tokens.


class Terminal:
    """Messages of a stage."""

    def log(self, message: str) -> None:
        print(message, flush=True)


@dataclass(frozen=True)
class Row:
    """What was seen of one file."""

    model: str
    type: str
    check: str
    same_ids: int
    texts: int
    same_answer: int
    kl: float


def tiny_qwen3(folder: Path) -> Path:
    """A random Qwen3 of two layers with the tokenizer of stories260K, in both forms that a tokenizer comes in."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STORIES / name, folder / name)
    write_sentencepiece(folder)
    return folder


def write_sentencepiece(folder: Path) -> None:
    """The folder's tokenizer.json as a tokenizer.model: llama.cpp knows a BPE by its name alone, and this one's not."""
    from transformers.utils import sentencepiece_model_pb2_new as form

    inner = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merged = {"".join(one if isinstance(one, list) else one.split(" ")): n for n, one in enumerate(inner["merges"])}
    proto = form.ModelProto()
    proto.trainer_spec.model_type = form.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(inner["vocab"])
    proto.trainer_spec.byte_fallback = True
    kinds = form.ModelProto.SentencePiece
    special = {"<unk>": kinds.UNKNOWN, "<s>": kinds.CONTROL, "</s>": kinds.CONTROL}
    for token, number in sorted(inner["vocab"].items(), key=lambda item: item[1]):
        kind = special.get(token, kinds.BYTE if token.startswith("<0x") else kinds.NORMAL)
        proto.pieces.add(piece=token, score=-float(merged.get(token, len(merged) + number)), type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def export(folder: Path, out: Path, type_: GgufType) -> tuple[Path, GgufReport]:
    """The file that the worker's stage writes, and its report."""
    out.mkdir(parents=True)
    spec = GgufSpec(output_dir=out, fingerprint="0" * 32, inputs={}, base_model=folder, name="bot", type=type_)
    gguf.run(spec, Terminal())
    report = GgufReport.model_validate_json((out / "report.json").read_text(encoding="utf-8"))
    return out / GGUF_FOLDER / report.file, report


def run(python: str, work: Path, models: Mapping[str, Path], types: Sequence[GgufType]) -> tuple[str, list[Row]]:
    """(version of llama-cpp-python, rows).

    Args:
        python: interpreter of the other environment.
        work: an empty folder.
    """
    request: dict[str, Any] = {}
    made: dict[str, tuple[str, GgufReport, ChatFormat, Path]] = {}
    for name, folder in models.items():
        chat = load_chat_format(folder)
        prompt = chat.prompt_ids([{"role": "user", "content": "Once upon a time, there was a little girl named Lily."}])
        for type_ in types:
            file, report = export(folder, work / f"{len(made)}", type_)
            made[f"{name} {type_}"] = (name, report, chat, folder)
            question = {"file": str(file), "texts": list(PROBES), "prompt": prompt, "most": ANSWER}
            request[f"{name} {type_}"] = question
    path = work / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    subprocess.run([python, str(Path(load_back_gguf_other.__file__)), str(path)], check=True, cwd=work)
    answer: dict[str, Any] = json.loads(path.with_suffix(".answer.json").read_text(encoding="utf-8"))
    rows = [
        _row(name, report, chat, folder, request[key]["prompt"], answer["told"][key])
        for key, (name, report, chat, folder) in made.items()
    ]
    return str(answer["version"]), rows


@torch.no_grad()
def _row(
    name: str, report: GgufReport, chat: ChatFormat, folder: Path, prompt: list[int], told: Mapping[str, Any]
) -> Row:
    model, _ = load_causal_lm(folder, dtype=torch.float32)
    model.eval()
    ids = torch.tensor([prompt])
    expected = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    # Of llama.cpp's rows, those of tokens that the tokenizer has.
    found = torch.tensor(told["logprobs"], dtype=torch.float64)[:, : expected.shape[1]]
    here: list[int] = []
    while len(here) < ANSWER:
        here.append(int(model(input_ids=torch.tensor([prompt + here])).logits[0, -1].argmax()))
    same = next((n for n, (a, b) in enumerate(zip(here, told["answer"], strict=True)) if a != b), ANSWER)
    texts = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    [verdict] = gguf_verdicts(report)
    return Row(
        name,
        report.type,
        verdict.level,
        sum(a == b for a, b in zip(texts, told["ids"], strict=True)),
        len(texts),
        same,
        float((expected.exp() * (expected - found)).sum(-1).mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--model", action="append", type=Path, default=[], help="folder of a model of yours")
    parser.add_argument("--type", action="append", choices=get_args(GgufType), help="default: f16 and q8_0")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="dpo-assets-gguf-") as work:
        models = {"stories260K": STORIES, "random Qwen3": tiny_qwen3(Path(work) / "qwen3")}
        models |= {folder.name: folder for folder in arguments.model}
        version, rows = run(arguments.python, Path(work) / "files", models, arguments.type or ["f16", "q8_0"])
    print(f"\nllama-cpp-python {version} against transformers {transformers.__version__}\n")
    print("| model | type | check | texts with the same ids | greedy answer the same | KL, nats per token |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        answer = f"{row.same_answer} of {ANSWER} tokens"
        print(f"| {row.model} | {row.type} | {row.check} | {row.same_ids} of {row.texts} | {answer} | {row.kl:.2g} |")


if __name__ == "__main__":
    main()
