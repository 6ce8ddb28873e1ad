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

from dpo_assets.contract import CHAT_FORMAT, TOKENS, ChatFormatFacts, TokenizeSpec
from dpo_assets.feedback.pair import PAIR_COLUMNS, polars_schema
from dpo_assets.feedback.screening import Screened
from dpo_assets.training.batches.data import first_asked
from dpo_assets.training.models.chat_format import ChatFormat
from dpo_assets.training.stages import tokenize
from dpo_assets.training.stages.tokenize import PairTokenizer

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
    tokenize.run(TokenizeSpec(**common, pairs=folder / "pairs.parquet", known=() if known is None else (known,)), log)
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


def pair_of(
    prompt: list[dict[str, str]], chosen: str = "yes, it is", rejected: str = "no", **more: str
) -> dict[str, Any]:
    answers = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
    return {"pair_id": "a" * 32, "prompt": prompt, **answers, **more}


def one_row(template: str, pair: dict[str, Any], *, joined: tuple[str, ...] = ()) -> Any:
    """(row of tokens.parquet, tokenizer); each text of `joined` is one token."""
    tokenizer = trained("bytes", template, plain_marks())
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in joined])
    worker = PairTokenizer(ChatFormat(tokenizer))
    given = table([{k: v for k, v in pair.items() if k != "tools"}])
    if "tools" in pair:
        given = given.with_columns(tools=pl.lit(pair["tools"]))
    return worker.encoded(worker.rendered(given)).row(0, named=True), tokenizer


QUESTION = [message("user", "the quick brown fox?")]
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def thinking(*, answers: str = "{{ m.content }}", start: str = "<|im_start|>") -> str:
    """Qwen3.5's shape: the prompt opens `<think>` and a line end, a finished turn holds an empty block."""
    turn = f"{{% if m.role == 'assistant' %}}{EMPTY_THOUGHT}{answers}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    return (
        f"{{% for m in messages %}}{start}{{{{ m.role }}}}\n{turn}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{start}assistant\n<think>\n{{% endif %}}"
    )


@pytest.mark.parametrize("start", ["<|im_start|>", "# "], ids=["marks", "no mark before the turn"])
def test_a_thinking_template_parts_where_both_renderings_do(start: str) -> None:
    """Every row of such a base was quarantined, with the advice to mend the export."""
    row, tokenizer = one_row(thinking(start=start), pair_of(QUESTION), joined=("\n\n",))
    assert row["template_fault"] is None
    prompt = tokenizer.decode(row["prompt_ids"])
    assert prompt == f"{start}user\nthe quick brown fox?<|im_end|>\n{start}assistant\n<think>"
    for side, answer in (("chosen_ids", "yes, it is"), ("rejected_ids", "no")):
        whole = f"{start}user\nthe quick brown fox?<|im_end|>\n{start}assistant\n{EMPTY_THOUGHT}{answer}<|im_end|>\n"
        assert prompt + tokenizer.decode(row[side]) == whole


def test_a_model_answers_to_the_whole_opened_turn_and_not_to_what_answers_share() -> None:
    """Sampled from the shared start, a thinking model is asked what no one ever asks it."""
    row, tokenizer = one_row(thinking(), pair_of(QUESTION), joined=("\n\n",))
    asked, chat = {"prompt": QUESTION, "prompt_ids": list(row["prompt_ids"])}, ChatFormat(tokenizer)
    [(found, ids)] = first_asked([asked, asked], chat, 2, 1000)
    assert found is asked
    assert tokenizer.decode(ids) == tokenizer.decode(row["prompt_ids"]) + "\n"
    assert len(ids) > len(row["prompt_ids"])
    assert first_asked([asked], chat, 1, len(ids) - 1) == []


def test_a_model_is_asked_with_the_tools_of_its_prompt() -> None:
    row, tokenizer = one_row(WITH_TOOLS, pair_of(QUESTION, tools=TOOLS))
    asked = {"prompt": QUESTION, "prompt_ids": list(row["prompt_ids"]), "tools": TOOLS}
    assert [ids for _, ids in first_asked([asked], ChatFormat(tokenizer), 1, 1000)] == [list(row["prompt_ids"])]


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["marks", "no marks"])
def test_a_prompt_that_changes_once_an_answer_follows_is_still_quarantined(template: str) -> None:
    """Only what opens the assistant's turn may differ: here the question itself does."""
    changing = template.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}")
    row, _ = one_row(changing, pair_of(QUESTION))
    assert row["template_fault"] == "template_boundary"


REASONED = "<think>\nthe fox is quick\n</think>\n\nyes, it is"


@pytest.mark.parametrize(
    ("content", "chosen", "fault"),
    [
        ("{{ m.content.split('</think>')[-1] }}", REASONED, "template_drops_text: of the chosen answer"),
        ("{{ m.content.split('</think>')[-1] }}", "yes, it is", None),
        ("{{ m.content | trim }}", f"  {REASONED}\n", None),
        # Qwen3 takes the block out and sets it again, with white space of its own.
        ("{{ m.content.replace('<think>\n', '<think>').replace('\n\nyes', ' yes') }}", REASONED, None),
    ],
    ids=["reasoning cut off", "no reasoning", "trimmed", "white space of its own"],
)
def test_reasoning_that_people_judged_is_not_lost_without_a_word(content: str, chosen: str, fault: str | None) -> None:
    """Templates of DeepSeek-R1's shape render what follows the block, and nothing would be learnt of the rest."""
    row, _ = one_row(CHATML.replace("{{ m.content }}", content), pair_of(QUESTION, chosen))
    assert row["template_fault"] == fault


def test_an_answer_is_not_found_in_the_question_that_holds_the_same_words() -> None:
    silent = CHATML.replace("{{ m.content }}", "{{ '' if m.role == 'assistant' else m.content }}")
    row, _ = one_row(silent, pair_of([message("user", "say: yes, it is, or no")]))
    assert row["template_fault"] == "template_drops_text: of the chosen answer"


def test_a_system_message_that_the_template_leaves_out_is_told() -> None:
    deaf = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    row, _ = one_row(deaf, pair_of([message("system", "be brief"), *QUESTION]))
    assert row["template_fault"] == "template_drops_text: of the prompt"


def test_reasoning_of_earlier_turns_may_go() -> None:
    """Qwen3 and DeepSeek-R1 were trained on conversations without it."""
    last = "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}"
    turns = [*QUESTION, message("assistant", REASONED), message("user", "and now?")]
    row, _ = one_row(CHATML.replace("{{ m.content }}", last), pair_of(turns))
    assert row["template_fault"] is None


TOOLS = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
WITH_TOOLS = "{% if tools %}<|im_start|>tools {{ tools[0].function.name }}<|im_end|>{% endif %}" + CHATML


def test_tools_are_rendered_into_the_prompt_they_belong_to() -> None:
    row, tokenizer = one_row(WITH_TOOLS, pair_of(QUESTION, tools=TOOLS))
    assert row["template_fault"] is None
    assert tokenizer.decode(row["prompt_ids"]).startswith("<|im_start|>tools weather<|im_end|>")


def test_pairs_with_and_without_tools_keep_their_places() -> None:
    tokenizer = trained("bytes", WITH_TOOLS, plain_marks())
    worker = PairTokenizer(ChatFormat(tokenizer))
    given = ["", TOOLS, "", TOOLS.replace("weather", "clock"), TOOLS]
    rows = [pair_of([message("user", f"number {n}")]) | {"pair_id": str(n) * 32} for n in range(len(given))]
    made = worker.encoded(worker.rendered(table(rows).with_columns(tools=pl.Series(given))))
    for n, (name, row) in enumerate(zip(["", "weather", "", "clock", "weather"], made.to_dicts(), strict=True)):
        tools = f"<|im_start|>tools {name}<|im_end|>" if name else ""
        opened = f"{tools}<|im_start|>user\nnumber {n}<|im_end|>\n<|im_start|>assistant\n"
        assert (row["pair_id"], tokenizer.decode(row["prompt_ids"])) == (str(n) * 32, opened)


@pytest.mark.parametrize(
    ("template", "tools", "reason"),
    [
        (CHATML, TOOLS, "unsupported_modality"),
        (WITH_TOOLS, "[5]", "template_refused"),
        (CHATML, "[", "template_refused"),
    ],
    ids=["no place for tools", "no tool", "no JSON"],
)
def test_tools_that_cannot_be_rendered_cost_their_row(template: str, tools: str, reason: str) -> None:
    row, _ = one_row(template, pair_of(QUESTION, tools=tools))
    assert row["template_fault"].startswith(f"{reason}: ")


@pytest.mark.parametrize(("rows", "fault"), [(0, None), (400, "no_embedding: <image>"), (500, None)])
def test_a_pair_whose_text_holds_a_token_without_an_embedding_is_told(rows: int, fault: str | None) -> None:
    """An index beyond the embedding ends a CPU stage in an IndexError, and a GPU in a device-side assert."""
    pair = pair_of(QUESTION, chosen="see <image>")
    inner = trained("bytes", CHATML, plain_marks())
    inner.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]})
    worker = PairTokenizer(ChatFormat(inner), min(rows, len(inner) - 1) if rows == 400 else rows)
    assert worker.encoded(worker.rendered(table([pair])))["template_fault"].to_list() == [fault]


def test_the_stage_tells_what_ends_a_turn(screened: Screened, model_folder: Path, tmp_path: Path) -> None:
    made_of(screened.pairs.head(2), model_folder, tmp_path / "out")
    assert ChatFormatFacts.model_validate_json((tmp_path / "out" / CHAT_FORMAT).read_bytes()).ends == (1, 2)
