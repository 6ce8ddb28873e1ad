"""Stage `tokenize`: pairs of messages to token ids, by the base model's own chat template."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_assets.ahead import ahead
from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.contract import CHAT_FORMAT, TOKENS, ChatFormatFacts, Progress, TokenizeSpec
from dpo_assets.feedback.pair import TOOLS, token_schema
from dpo_assets.feedback.rules import (
    NO_EMBEDDING,
    TEMPLATE_BOUNDARY,
    TEMPLATE_DROPS_TEXT,
    TEMPLATE_REFUSED,
    UNSUPPORTED_MODALITY,
)
from dpo_assets.training.models.chat_format import RENDERING_ERRORS, ChatFormat, load_chat_format

if TYPE_CHECKING:
    # For its type alone: the module also has Trainer's callbacks, and Trainer imports PEFT and torch's compiler.
    from dpo_assets.training.reporting import Reporter

PART = 2048  # Pairs rendered and tokenized at once, which is what is held in memory.
SCHEMA = dict(token_schema())
COLUMNS = ("pair_id", "prompt", "chosen", "rejected", TOOLS)

Conversation = list[dict[str, str]]
Ids = list[int]


def run(spec: TokenizeSpec, reporter: Reporter) -> None:
    """Writes `tokens.parquet`: pair_id, prompt_ids, chosen_ids, rejected_ids, template_fault; and `chat_format.json`.

    What it writes does not depend on what was known before.
    """
    started = time.perf_counter()
    # Nothing forks here, which is what it is off for elsewhere.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    chat = load_chat_format(spec.base_model, spec.template)
    pairs = PairTokenizer(chat, spec.vocabulary)
    known = KnownTokens(spec.known)
    total = pq.read_metadata(spec.pairs).num_rows
    done = reused = 0

    def prepared(part: pl.DataFrame) -> tuple[pl.Series, pl.DataFrame, Rendered]:
        have, once = known.of(part["pair_id"]), part.unique("pair_id", keep="first", maintain_order=True)
        return part["pair_id"], have, pairs.rendered(once.join(have, on="pair_id", how="anti", maintain_order="left"))

    with pq.ParquetWriter(spec.output_dir / TOKENS, _arrow(pl.DataFrame(schema=SCHEMA)).schema) as writer:
        for identity, have, fresh in ahead(map(prepared, _parts(spec.pairs))):
            rows = pl.concat([have, pairs.encoded(fresh)])
            writer.write_table(_arrow(identity.to_frame().join(rows, on="pair_id", how="left", maintain_order="left")))
            done, reused = done + len(identity), reused + identity.is_in(have["pair_id"].to_list()).sum()
            reporter.log(Progress(stage="tokenize", done=done, total=total).line())
    write_json(spec.output_dir / CHAT_FORMAT, ChatFormatFacts(ends=tuple(sorted(chat.ends))).model_dump(mode="json"))
    reporter.log(f"tokenize: {reused} of {total} pairs were tokenized before")
    kept = {"pairs": total, "pairs_from_cache": reused}
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started, **kept})


def _parts(path: Path) -> Iterator[pl.DataFrame]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(PART, columns=[name for name in COLUMNS if name in file.schema_arrow.names]):
            part = pl.from_arrow(batch)
            assert isinstance(part, pl.DataFrame)
            yield part


def _arrow(table: pl.DataFrame) -> Any:
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())


class Pair(NamedTuple):
    """What a template gets of one pair."""

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    tools: str

    @property
    def tool_list(self) -> list[Any] | None:
        return json.loads(self.tools) if self.tools else None


class Texts(NamedTuple):
    """A pair as text: its prompt with the assistant's turn opened, and its two conversations."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Rendered:
    """Pairs as text. `pieces` has four of each pair: what its conversations share, and what follows in prompt, chosen
    and rejected conversation. `faults` has by pair what keeps it from being rendered; their pieces are empty."""

    pair_ids: pl.Series
    pairs: list[Pair]
    pieces: list[str]
    faults: dict[int, str]

    def prompt(self, number: int) -> str:
        """The rendered prompt of a pair."""
        return self.pieces[4 * number] + self.pieces[4 * number + 1]


class KnownTokens:
    """Token ids that earlier runs have made, of which only the rows that are asked for are read.

    Args:
        tables: each has pairs in the order of their ids; one in another order is passed over.
    """

    def __init__(self, tables: Iterable[Path]) -> None:
        found = ((path, pl.read_parquet(path, columns=["pair_id"])["pair_id"]) for path in tables)
        self._tables = [(path, ids) for path, ids in found if ids.len() and ids.is_sorted()]

    def of(self, pair_ids: pl.Series) -> pl.DataFrame:
        """The rows of those that are known, each once."""
        found = [pl.DataFrame(schema=SCHEMA)]
        if not pair_ids.is_empty():
            wanted = pair_ids.unique().to_frame()
            found += [self._in(path, ids, wanted) for path, ids in self._tables]
        return pl.concat(found).unique("pair_id", maintain_order=True)

    def _in(self, path: Path, ids: pl.Series, wanted: pl.DataFrame) -> pl.DataFrame:
        start = ids.search_sorted(wanted["pair_id"].min(), side="left")
        stop = ids.search_sorted(wanted["pair_id"].max(), side="right")
        if not ids[start:stop].is_in(wanted["pair_id"].to_list()).any():
            return pl.DataFrame(schema=SCHEMA)
        columns = [name for name in SCHEMA if name in pq.read_schema(path).names]
        rows = pl.scan_parquet(path).select(columns).slice(start, stop - start).collect()
        # Pairs that a batch kept have no fault, and so no column for it.
        rows = rows.with_columns(pl.lit(None, dtype=SCHEMA[name]).alias(name) for name in SCHEMA if name not in columns)
        return rows.select(list(SCHEMA)).join(wanted, on="pair_id", how="semi")


class PairTokenizer:
    """Token ids of pairs as TRL 1.15 makes them: the answer starts where prompt and conversation diverge.

    Whole parts at once, and the prompt once instead of three times: tokenizers split a text at special tokens before
    anything else, so what stands before the last one in the prompt has the same ids whatever follows it.

    Args:
        vocabulary: rows of the model's embedding; 0: not known.
    """

    def __init__(self, chat: ChatFormat, vocabulary: int = 0) -> None:
        self._chat, self._tokenizer, self._vocabulary = chat, chat.tokenizer, vocabulary

    def rendered(self, table: pl.DataFrame) -> Rendered:
        """Pairs (pair_id, prompt, chosen, rejected, and tools or not) in the chat template."""
        tools = table[TOOLS].fill_null("").to_list() if TOOLS in table.columns else [""] * table.height
        conversations = (table[name].to_list() for name in ("prompt", "chosen", "rejected"))
        pairs = [Pair(*row) for row in zip(*conversations, tools, strict=True)]
        texts: list[Texts] = [Texts("", "", "")] * len(pairs)
        faults: dict[int, str] = {}
        by_tools: dict[str, list[int]] = {}
        for n, pair in enumerate(pairs):
            by_tools.setdefault(pair.tools, []).append(n)
        for numbers in by_tools.values():
            self._render([(n, pairs[n]) for n in numbers], texts, faults)
        for n, pair in enumerate(pairs):
            if n not in faults and (fault := self._lost(pair, texts[n])):
                faults[n], texts[n] = fault, Texts("", "", "")
        pieces: list[str] = []
        for three in texts:
            cut = self._shared(*three)
            pieces += (three.prompt[:cut], three.prompt[cut:], three.chosen[cut:], three.rejected[cut:])
        return Rendered(table["pair_id"], pairs, pieces, faults)

    def _render(self, pairs: list[tuple[int, Pair]], texts: list[Texts], faults: dict[int, str]) -> None:
        """Puts the texts of pairs with equal tools in their places, and what the template refuses."""
        try:
            made = self._texts([pair for _, pair in pairs])
        except RENDERING_ERRORS as error:
            # Templates refuse what their model was not trained on, a system message for example. Those pairs only.
            if len(pairs) == 1:
                faults[pairs[0][0]] = f"{TEMPLATE_REFUSED}: {error}"
                return
            for one in pairs:
                self._render([one], texts, faults)
            return
        for (n, _), three in zip(pairs, made, strict=True):
            texts[n] = three

    def _texts(self, pairs: Sequence[Pair]) -> list[Texts]:
        """Pairs with equal tools as text.

        Raises:
            TemplateError, TypeError, ValueError, KeyError: the chat template refuses one of them.
        """
        tools = pairs[0].tool_list if pairs else None
        prompts = self._chat.texts([pair.prompt for pair in pairs], answer_follows=True, tools=tools)
        chosen, rejected = (
            self._chat.texts([pair.prompt + answer for pair, answer in answered], answer_follows=False, tools=tools)
            for answered in ([(p, p.chosen) for p in pairs], [(p, p.rejected) for p in pairs])
        )
        return list(map(Texts, prompts, chosen, rejected))

    def _lost(self, pair: Pair, texts: Texts) -> str | None:
        """What the template leaves out of what people saw or judged, as a fault; None: nothing.

        Reasoning of earlier turns may go: many models were trained on conversations without it.
        """
        if pair.tools and self._texts([pair._replace(tools="")])[0].prompt == texts.prompt:
            return f"{UNSUPPORTED_MODALITY}: the chat template has no place for tools"
        asked = [m["content"] for m in pair.prompt if m["role"] != "assistant"]
        if not _holds(texts.prompt, asked):
            return f"{TEMPLATE_DROPS_TEXT}: of the prompt"
        for side, answer, text in (("chosen", pair.chosen, texts.chosen), ("rejected", pair.rejected, texts.rejected)):
            # Behind the prompt, which may hold the same words.
            start = len(texts.prompt) if text.startswith(texts.prompt) else self._shared(*texts)
            if not _holds(text[start:], [m["content"] for m in answer]):
                return f"{TEMPLATE_DROPS_TEXT}: of the {side} answer"
        return None

    def encoded(self, part: Rendered) -> pl.DataFrame:
        """`tokens.parquet` for rendered pairs."""
        ids = self._ids(part.pieces)
        rows = [_row(ids[n] + ids[n + 1], ids[n] + ids[n + 2], ids[n] + ids[n + 3]) for n in range(0, len(ids), 4)]
        prompts, chosen, rejected = (_column([row.ids[n] for row in rows]) for n in range(3))
        highest = max((column.explode().max() or 0 for column in (prompts, chosen, rejected)), default=0)
        beyond = bool(self._vocabulary) and highest >= self._vocabulary
        faults = [part.faults.get(n) or self._fault(part, n, row, beyond) for n, row in enumerate(rows)]
        return pl.DataFrame(dict(zip(SCHEMA, (part.pair_ids, prompts, chosen, rejected, faults), strict=True)), SCHEMA)

    def _fault(self, part: Rendered, number: int, row: _Row, beyond: bool) -> str | None:
        """What only the ids show. `beyond`: some pair of the part has an id for which the embedding has no row."""
        if row.unshared and not self._only_opening(part, number, len(row.ids[0])):
            return TEMPLATE_BOUNDARY
        if beyond and (highest := max(chain(*row.ids), default=0)) >= self._vocabulary:
            return f"{NO_EMBEDDING}: {self._tokenizer.convert_ids_to_tokens(highest)}"
        return None

    def _only_opening(self, part: Rendered, number: int, shared: int) -> bool:
        """Whether all that prompt and conversations do not share is of the assistant's opened turn, and no message's.

        Thinking templates open the turn with `<think>` and a line end, and render a finished one with an empty block,
        whose two line ends may be one token.
        """
        pair, prompt = part.pairs[number], part.prompt(number)
        [unopened] = self._chat.texts([pair.prompt], answer_follows=False, tools=pair.tool_list)
        messages = unopened.rstrip()
        if not prompt.startswith(messages):
            return False
        if len(messages) <= len(part.pieces[4 * number]):
            return True
        if not self._tokenizer.is_fast:
            return len(self._tokenizer(messages, add_special_tokens=False)["input_ids"]) <= shared
        places = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        first_unshared: int = places[shared][0]
        return first_unshared >= len(messages)

    def _ids(self, texts: list[str]) -> list[Ids]:
        filled = [text for text in texts if text]
        ids: Iterator[Ids] = iter(
            self._tokenizer(filled, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            if filled
            else []
        )
        return [next(ids) if text else [] for text in texts]

    def _shared(self, prompt: str, chosen: str, rejected: str) -> int:
        """Where the last special token begins that all three texts have at the same place; 0 without one."""
        cut, mark = max(((prompt.rfind(mark), mark) for mark in self._marks), default=(0, ""))
        head = prompt[: cut + len(mark)]
        return cut if cut > 0 and chosen.startswith(head) and rejected.startswith(head) else 0

    @cached_property
    def _marks(self) -> list[str]:
        """Special tokens at which a text may be cut: they are found in it as it is, whatever stands beside them."""
        if not self._tokenizer.is_fast:
            return []
        added = [token for token in self._tokenizer.added_tokens_decoder.values() if token.content]
        plain = [t for t in added if t.special and not (t.normalized or t.lstrip or t.rstrip or t.single_word)]
        return [t.content for t in plain if not any(_overlap(t.content, o.content) for o in added if o is not t)]


def _overlap(mark: str, other: str) -> bool:
    """Whether a text in which `mark` stands may have `other` over its beginning, which would hide it."""
    return mark in other or any(other.endswith(mark[:n]) for n in range(1, len(mark)))


def _holds(text: str, parts: Iterable[str]) -> bool:
    """Whether a text holds each part, white space aside: templates strip it and set it around blocks."""
    bare: str | None = None
    for part in parts:
        if part.strip() in text:
            continue
        bare = "".join(text.split()) if bare is None else bare
        if "".join(part.split()) not in bare:
            return False
    return True


class _Row(NamedTuple):
    ids: tuple[Ids, Ids, Ids]  # Of the prompt and of both answers.
    unshared: bool  # Whether the rendered prompt has more tokens than both conversations begin with.


def _row(prompt: Ids, chosen: Ids, rejected: Ids) -> _Row:
    length = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
    return _Row((prompt[:length], chosen[length:], rejected[length:]), length < len(prompt))


def _common_prefix(a: Ids, b: Ids) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _column(rows: Sequence[Ids]) -> pl.Series:
    """Through one flat array: a list of lists takes five times as long."""
    counts = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(counts, dtype=np.int32)])
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offsets[-1]))
    series = pl.from_arrow(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)))
    assert isinstance(series, pl.Series)
    return series
