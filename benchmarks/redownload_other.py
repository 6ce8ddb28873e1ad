"""The part of `redownload` that runs in a clean environment: a release by its repository id alone, loaded and asked.

It needs torch, transformers and peft, and nothing of this project: `python -I redownload_other.py request.json`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import platform
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("transformers", "huggingface_hub", "tokenizers", "torch", "peft")


def by_auto_model(repo_id: str, revision: str) -> Any:
    """A merged release."""
    return AutoModelForCausalLM.from_pretrained(repo_id, revision=revision)


def by_auto_peft_model(repo_id: str, revision: str) -> Any:
    """An adapter release with the base that its own config names."""
    return AutoPeftModelForCausalLM.from_pretrained(repo_id, revision=revision)


def by_peft_model(repo_id: str, revision: str) -> Any:
    """An adapter release, put on the base by hand."""
    config = PeftConfig.from_pretrained(repo_id, revision=revision)
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    return PeftModel.from_pretrained(base, repo_id, revision=revision)


WAYS: dict[str, Callable[[str, str], Any]] = {
    "AutoModelForCausalLM": by_auto_model,
    "AutoPeftModelForCausalLM": by_auto_peft_model,
    "PeftModel on its base": by_peft_model,
}


@torch.no_grad()
def asked(model: Any, tokenizer: Any, question: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What a release makes of a conversation: its text and ids, the greedy answer, and how likely fixed answers are."""
    messages = question["messages"]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    given = torch.tensor([ids])
    out = model.generate(input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    scored = [_scored(model, tokenizer, messages, ids, content) for content in question["answers"]]
    return {
        "text": text,
        "ids": ids,
        "answer": out[0, len(ids) :].tolist(),
        "spoken": tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True),
        "answer_ids": [answer for answer, _ in scored],
        "logps": [logp for _, logp in scored],
    }


def _scored(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], ids: list[int], content: str
) -> tuple[list[int], float]:
    """(ids of an answer with the end of its turn, their summed log-probability), by the model's own forward."""
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": content}], tokenize=False)
    row: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if row[: len(ids)] != ids:
        raise ValueError(f"the conversation does not begin with the ids of its prompt: {row} and {ids}")
    logps = model(input_ids=torch.tensor([row])).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
    answer = row[len(ids) :]
    return answer, float(logps.gather(-1, torch.tensor(answer)[:, None]).sum())


def said_by_the_card(card: Path) -> str:
    """What the first block of Python in a card prints when it is run as it stands."""
    found = re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError("the card has no lines of Python")
    with redirect_stdout(io.StringIO()) as printed:
        exec(found[1], {"__name__": "card"})
    return printed.getvalue().removesuffix("\n")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What every way of loading the release says, or why it is none."""
    repo_id, revision = request["repo_id"], request["revision"]
    card = Path(hf_hub_download(repo_id, "README.md", revision=revision))
    told: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "has_this_project": importlib.util.find_spec("dpo_assets") is not None,
        "commit": card.parent.name,
        "said": {},
        "why_not": {},
        "card": None,
    }
    for way in request["ways"]:
        try:
            tokenizer = AutoTokenizer.from_pretrained(repo_id, revision=revision)
            model = WAYS[way](repo_id, revision).eval()
            told["said"][way] = [asked(model, tokenizer, one, request["tokens"]) for one in request["questions"]]
        except Exception as error:
            told["why_not"][way] = f"{type(error).__name__}: {error}".splitlines()[0]
    if request["card"]:
        told["card"] = said_by_the_card(card)
    return told


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    path = Path(sys.argv[1])
    result = answer(json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".answer.json").write_text(json.dumps(result), encoding="utf-8")
