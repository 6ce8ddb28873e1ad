"""Token ids of pairs, whole parts at once, are those that TRL makes row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_assets.contract import TOKENS, TokenizeSpec
from dpo_assets.feedback.pair import PAIR_COLUMNS, polars_schema
from dpo_assets.feedback.screening import Screened
from dpo_assets.training import tokenize
from dpo_assets.training.chat_format import ChatFormat
from dpo_assets.training.tokenize import PairTokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRIPPED = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TEXT = [
    "the quick brown fox",
    "jumps over\n\nthe lazy dog",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e",
    "<think> 12 345",
] * 20


def trained(kind: str, template: str, marks: list[AddedToken]) -> Any:
    """A small BPE tokenizer, of one of the two kinds that models have."""
    inner = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", unk_token="<unk>"))
    if kind == "bytes":
        inner.normalizer = normalizers.NFC()
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "first" else "always")
        alphabet = []
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet)
    )
    inner.add_special_tokens(marks)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    made.chat_template = template
    return made


def plain_marks(**changes: bool) -> list[AddedToken]:
    return [AddedToken(mark, special=True, normalized=False, **changes) for mark in MARKS]


TOKENIZERS = {
    f"{kind}-{name}": trained(kind, template, plain_marks())
    for kind in ("bytes", "first", "always")
    for name, template in (("chatml", CHATML), ("thinking", THINKING), ("plain", PLAIN), ("stripped", STRIPPED))
}
TOKENIZERS["marks that take white space"] = trained("bytes", CHATML, plain_marks(lstrip=True))
TOKENIZERS["a mark inside another"] = trained(
    "bytes", CHATML, [*plain_marks(), AddedToken("\n<|im_start|>assistant", special=True, normalized=False)]
)


def as_trl_does(tokenizer: Any, pair: dict[str, Any]) -> dict[str, Any]:
    """TRL 1.15, `DPOTrainer._prepare_dataset`: the completion starts where prompt and conversation diverge."""

    def ids(messages: list[dict[str, str]], *, answer_follows: bool) -> list[int]:
        rendered: list[int] = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=answer_follows, return_dict=True
        )["input_ids"]
        return rendered

    prompt = ids(pair["prompt"], answer_follows=True)
    answers = [ids(pair["prompt"] + pair[side], answer_follows=False) for side in ("chosen", "rejected")]
    length = 0
    while length < min(map(len, [prompt, *answers])) and prompt[length] == answers[0][length] == answers[1][length]:
        length += 1
    whole = length == len(prompt) or only_opening(tokenizer, pair, length)
    return {
        "pair_id": pair["pair_id"],
        "prompt_ids": prompt[:length],
        "chosen_ids": answers[0][length:],
        "rejected_ids": answers[1][length:],
        "template_fault": None if whole else "template_boundary",
    }


def only_opening(tokenizer: Any, pair: dict[str, Any], shared: int) -> bool:
    """Whether the token of the last letter of the prompt's messages is among the first `shared`."""
    opened, closed = (
        tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=opens)
        for opens in (True, False)
    )
    tokens = tokenizer(opened, add_special_tokens=False)
    # A letter that NFC joined to the one before has no token of its own.
    of_letters = [tokens.char_to_token(n) for n in range(len(closed.rstrip()))]
    return opened.startswith(closed.rstrip()) and max(n for n in of_letters if n is not None) < shared


def table(pairs: list[dict[str, Any]]) -> pl.DataFrame:
    kinds = polars_schema(PAIR_COLUMNS)
    return pl.DataFrame(pairs, schema={name: kinds[name] for name in ("pair_id", "prompt", "chosen", "rejected")})


texts = st.lists(
    st.sampled_from([*"abc .\n\t\u00e9\u65e5e\u0301", *MARKS, "<", "<|im", "assistant", "\nassistant", "the quick"]),
    min_size=1,
    max_size=8,
).map("".join)


def tokenized(tokenizer: Any, pairs: pl.DataFrame) -> pl.DataFrame:
    worker = PairTokenizer(ChatFormat(tokenizer))
    return worker.encoded(worker.rendered(pairs))


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@st.composite
def pairs(draw: st.DrawFn) -> dict[str, Any]:
    turns = [message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [message("user", draw(texts)), message("assistant", draw(texts))]
    turns.append(message("user", draw(texts)))
    chosen, rejected = ([message("assistant", draw(texts))] for _ in range(2))
    return {"pair_id": "0" * 32, "prompt": turns, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(pairs(), max_size=4))
def test_whole_parts_get_the_ids_that_trl_gives_row_by_row(name: str, rows: list[dict[str, Any]]) -> None:
    """Whatever the texts hold, special tokens and pieces of them included."""
    tokenizer = TOKENIZERS[name]
    made = tokenized(tokenizer, table(rows))
    assert made.to_dicts() == [as_trl_does(tokenizer, row) for row in rows]


def test_real_pairs_get_the_ids_that_trl_gives_row_by_row(screened: Screened, tokenizer: Any) -> None:
    made = tokenized(tokenizer, screened.pairs)
    assert made.to_dicts() == [as_trl_does(tokenizer, row) for row in screened.pairs.iter_rows(named=True)]


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def made_of(pairs: pl.DataFrame, model_folder: Path, folder: Path, known: Path | None = None) -> tuple[Path, str]:
    folder.mkdir()
    pairs.write_parquet(folder / "pairs.parquet")
    common: dict[str, Any] = {"output_dir": folder, "fingerprint": "f" * 32, "inputs": {}, "base_model": model_folder}
    log = Log()
    tokenize.run(TokenizeSpec(**common, pairs=folder / "pairs.parquet", known=known), log)
    return folder / TOKENS, log.lines[-1]


def test_pairs_that_were_tokenized_before_are_not_again_and_the_table_is_the_same(
    screened: Screened, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "PART", 16)
    pairs = screened.pairs.sort("pair_id")
    fresh, _ = made_of(pairs, model_folder, tmp_path / "fresh")
    earlier, _ = made_of(pairs.gather_every(3), model_folder, tmp_path / "earlier")
    again, said = made_of(pairs, model_folder, tmp_path / "again", known=earlier)
    assert said == f"tokenize: {pairs.gather_every(3).height} of {pairs.height} pairs were tokenized before"
    assert again.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("order", ["shuffled", "others", "empty"])
def test_what_is_known_of_other_pairs_or_in_no_order_changes_nothing(
    screened: Screened, model_folder: Path, tmp_path: Path, order: str
) -> None:
    pairs = screened.pairs.sort("pair_id")
    known = {
        "shuffled": pairs.sample(fraction=1, shuffle=True, seed=1), "others": pairs[:10], "empty": pairs.clear(),
    }[order]  # fmt: skip
    earlier, _ = made_of(known, model_folder, tmp_path / "earlier")
    now, said = made_of(pairs[10:40], model_folder, tmp_path / "now", known=earlier)
    assert said == "tokenize: 0 of 30 pairs were tokenized before"
    assert pl.read_parquet(now)["pair_id"].to_list() == pairs[10:40]["pair_id"].to_list()


@pytest.mark.parametrize("name", ["bytes-chatml", "bytes-thinking", "first-chatml"])
def test_the_prompt_is_tokenized_once(name: str) -> None:
    question = "the quick brown fox " * 50
    pair = {"pair_id": "0" * 32, "prompt": [message("user", question)]}
    pair |= {side: [message("assistant", side)] for side in ("chosen", "rejected")}
    pieces = PairTokenizer(ChatFormat(TOKENIZERS[name])).rendered(table([pair])).pieces
    assert [question in piece for piece in pieces] == [True, False, False, False]


def test_where_no_mark_can_be_trusted_the_prompt_is_tokenized_with_each_answer() -> None:
    pair = {"pair_id": "0" * 32, "prompt": [message("user", "q")]}
    pair |= {side: [message("assistant", side)] for side in ("chosen", "rejected")}
    for name in ("bytes-plain", "marks that take white space"):
        assert PairTokenizer(ChatFormat(TOKENIZERS[name])).rendered(table([pair])).pieces[0] == ""


def test_a_pair_that_the_template_refuses_costs_itself_and_says_what_the_template_said() -> None:
    """Gemma's templates know no system message, Mistral's want turns to alternate."""
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + CHATML
    tokenizer = trained("bytes", template, plain_marks())
    answers = {side: [message("assistant", side)] for side in ("chosen", "rejected")}
    good = {"pair_id": "a" * 32, "prompt": [message("user", "hello")], **answers}
    bad = {"pair_id": "b" * 32, "prompt": [message("system", "be brief"), message("user", "hello")], **answers}
    made = tokenized(tokenizer, table([bad, good, bad | {"pair_id": "c" * 32}]))
    said = "template_refused: no system, please"
    assert made["template_fault"].to_list() == [said, None, said]
    assert made.row(1, named=True) == as_trl_does(tokenizer, good)
    assert made["prompt_ids"][0].is_empty()
