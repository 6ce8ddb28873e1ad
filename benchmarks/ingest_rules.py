"""The rules of `benchmarks.ingest` as a user of `datasets` writes them: functions of one row, for `map` and `filter`.

Plain Python throughout, each row looked at once; where this package has a fast way of its own, it is not used here.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from functools import cache
from typing import Any

ROLES = {"system", "user", "assistant"}
SPACE = re.compile(r"\s+")
CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f]")
FLAGS = {
    "email": re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,4}\.[A-Za-z]{2,24}\b"),
    "card": re.compile(r"(?<![0-9])[0-9](?:[ -]?[0-9]){12,18}(?![0-9])"),
    "phone": re.compile(r"(?<![0-9A-Za-z+])(?:\+[1-9][0-9]{0,3}[ .-]?[0-9](?:[ .-]?[0-9]){6,12})(?![0-9])"),
    "secret": re.compile(
        r"\bhf_[A-Za-z0-9]{20,}\b|\bsk-[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}"
    ),
    "template": re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"),
}
EMPTY: dict[str, Any] = {
    "fault": "", "prompt": [], "chosen": [], "rejected": [], "row": "", "meta": "{}", "pair_id": "", "flipped_id": "",
    "prompt_id": "", "group_id": "", "near_id": "", "flags": "", "row_hash": "", "raw": "",
}  # fmt: skip


def fold(text: str) -> str:
    return SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(items)) != len(items):
        raise ValueError("duplicate_key")
    return dict(items)


def no_constants(name: str) -> None:
    raise ValueError("invalid_json")


def messages(value: Any, role: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError("wrong_type")
    result = []
    for message in value:
        text = message["content"]
        if not isinstance(text, str):
            raise ValueError("wrong_type")
        text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
        result.append({"role": message["role"], "content": unicodedata.normalize("NFC", text)})
    return result


def check(prompt: list[dict[str, str]], chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> None:
    for message in [*prompt, *chosen, *rejected]:
        if message["role"] not in ROLES:
            raise ValueError("unknown_role")
        if "\x00" in message["content"]:
            raise ValueError("nul_character")
        if not message["content"].strip():
            raise ValueError("empty")
    for answer in (chosen, rejected):
        turns = [m["role"] for m in [*prompt, *answer] if m["role"] != "system"]
        if turns != ["user" if n % 2 == 0 else "assistant" for n in range(len(turns))] or turns[-1] != "assistant":
            raise ValueError("bad_role_order")
    if [fold(m["content"]) for m in chosen] == [fold(m["content"]) for m in rejected]:
        raise ValueError("no_preference")


def parse(row: dict[str, str]) -> dict[str, Any]:
    """A line as a pair, or as a faulty row with its text."""
    text = row["text"]
    raw_hash = hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constants)
        json.dumps(value, ensure_ascii=False).encode()
        prompt, chosen, rejected = (
            messages(value[name], role)
            for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
        )
        check(prompt, chosen, rejected)
    except (ValueError, KeyError, TypeError) as error:
        return {**EMPTY, "fault": str(error) or "invalid_json", "raw": text, "row_hash": raw_hash}
    texts = "\n".join(m["content"] for m in [*prompt, *chosen, *rejected])
    extra = {k: v for k, v in value.items() if k not in ("prompt", "chosen", "rejected", "id")}
    folded = [[m["role"], fold(m["content"])] for m in prompt]
    return {
        "fault": "",
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "row": str(value.get("id", "")),
        "meta": json.dumps(extra, sort_keys=True, ensure_ascii=False),
        "pair_id": digest([prompt, chosen, rejected]),
        "flipped_id": digest([prompt, rejected, chosen]),
        "prompt_id": digest(folded),
        "group_id": digest(next(text for role, text in folded if role == "user")),
        "near_id": digest([re.findall(r"[a-z0-9]+", texts.lower())]),
        "flags": ",".join(name for name, pattern in FLAGS.items() if pattern.search(texts)),
        "row_hash": raw_hash,
        "raw": "",
    }


def is_faulty(fault: str) -> bool:
    return bool(fault)


def is_sound(fault: str) -> bool:
    return not fault


def across(sound: Any) -> tuple[set[int], set[int], set[int]]:
    """(duplicates, contradictions, near duplicates) as row numbers, from the id columns."""
    first: dict[str, int] = {}
    duplicates, conflicts, near = set(), set(), set()
    for n, pair_id in enumerate(sound["pair_id"]):
        if first.setdefault(pair_id, n) != n:
            duplicates.add(n)
    seen: dict[str, int] = {}
    for n, (flipped, near_id) in enumerate(zip(sound["flipped_id"], sound["near_id"], strict=True)):
        if n in duplicates:
            continue
        if flipped in first:
            conflicts.add(n)
        elif seen.setdefault(near_id, n) != n:
            near.add(n)
    return duplicates, conflicts, near


def is_kept(fault: str, number: int, out: set[int]) -> bool:
    return number not in out


def is_train(group_id: str) -> bool:
    return not is_eval(group_id)


def is_eval(group_id: str) -> bool:
    draw = hashlib.sha256(f"0:{group_id}".encode()).digest()[:8]
    return int.from_bytes(draw, "big") / 2**64 < 0.1


def tokenize(row: dict[str, Any], folder: str, max_length: int) -> dict[str, Any]:
    """Token ids as TRL's trainers make them, row by row; a fault where nothing could be learned from them."""
    tokenizer = _tokenizer(folder)

    def render(messages: list[dict[str, str]], *, answer_follows: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=answer_follows, return_dict=True
        )["input_ids"]
        return ids

    prompt = render(row["prompt"], answer_follows=True)
    answers = [render(row["prompt"] + row[side], answer_follows=False) for side in ("chosen", "rejected")]
    length = min(_common(prompt, answer) for answer in answers)
    chosen, rejected = (answer[length:] for answer in answers)
    fault = ""
    if length < len(prompt):
        fault = "template_boundary"
    elif len(prompt) >= max_length:
        fault = "prompt_too_long"
    elif chosen[: max_length - length] == rejected[: max_length - length]:
        fault = "identical_after_truncation"
    return {"prompt_ids": prompt[:length], "chosen_ids": chosen, "rejected_ids": rejected, "fault": fault}


@cache
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _common(one: list[int], other: list[int]) -> int:
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))
