"""Stage `tokenize`: pairs of messages to token ids, by the base model's own chat template."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from dpo_assets.ahead import ahead
from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.contract import TOKENS, Progress, TokenizeSpec
from dpo_assets.feedback.pair import token_schema
from dpo_assets.feedback.rules import TEMPLATE_BOUNDARY, TEMPLATE_REFUSED

if TYPE_CHECKING:
    # For its type alone: the module also has Trainer's callbacks, and Trainer imports PEFT and torch's compiler.
    from dpo_assets.training.reporting import Reporter

PART = 2048  # Pairs rendered and tokenized at once, which is what is held in memory.
SCHEMA = dict(token_schema())

Conversation = list[dict[str, str]]
Ids = list[int]


def run(spec: TokenizeSpec, reporter: Reporter) -> None:
    """Writes `tokens.parquet`: pair_id, prompt_ids, chosen_ids, rejected_ids, template_fault.

    What it writes does not depend on what was known before.
    """
    # Not through `loading`, which would add PEFT; AutoTokenizer alone imports torch already, so this saves little.
    from transformers import AutoTokenizer

    started = time.perf_counter()
    # Nothing forks here, which is what it is off for elsewhere.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    pairs = PairTokenizer(AutoTokenizer.from_pretrained(spec.base_model, local_files_only=True))
    known = KnownTokens(spec.known)
    total = pq.read_metadata(spec.pairs).num_rows
    done = reused = 0

    def prepared(part: pl.DataFrame) -> tuple[pl.Series, pl.DataFrame, Rendered]:
        have = known.of(part["pair_id"])
        return part["pair_id"], have, pairs.rendered(part.join(have, on="pair_id", how="anti", maintain_order="left"))

    with pq.ParquetWriter(spec.output_dir / TOKENS, _arrow(pl.DataFrame(schema=SCHEMA)).schema) as writer:
        for identity, have, fresh in ahead(map(prepared, _parts(spec.pairs))):
            rows = pl.concat([have, pairs.encoded(fresh)])
            writer.write_table(_arrow(identity.to_frame().join(rows, on="pair_id", how="left", maintain_order="left")))
            done, reused = done + len(identity), reused + have.height
            reporter.log(Progress(stage="tokenize", done=done, total=total).line())
    reporter.log(f"tokenize: {reused} of {total} pairs were tokenized before")
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})


def _parts(path: Path) -> Iterator[pl.DataFrame]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(PART, columns=["pair_id", "prompt", "chosen", "rejected"]):
            part = pl.from_arrow(batch)
            assert isinstance(part, pl.DataFrame)
            yield part


def _arrow(table: pl.DataFrame) -> Any:
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())


@dataclass(frozen=True)
class Rendered:
    """Pairs as text. `pieces` has four of each pair: what its conversations share, and what follows in prompt, chosen
    and rejected conversation. `refused` has what the template said by pair; their pieces are empty."""

    pair_ids: pl.Series
    pieces: list[str]
    refused: dict[int, str]


class KnownTokens:
    """Token ids that an earlier run has made, of which only the rows that are asked for are read."""

    def __init__(self, path: Path | None) -> None:
        ids = (
            pl.Series("pair_id", [], dtype=pl.String)
            if path is None
            else pl.read_parquet(path, columns=["pair_id"])["pair_id"]
        )
        # In the order of ids, as the pipeline asks for them: what belongs to a part lies together.
        self._path, self._ids = path, ids if ids.is_sorted() else ids.clear()

    def of(self, pair_ids: pl.Series) -> pl.DataFrame:
        """The rows of those that are known."""
        nothing = pl.DataFrame(schema=SCHEMA)
        if self._path is None or self._ids.is_empty() or pair_ids.is_empty():
            return nothing
        start = self._ids.search_sorted(pair_ids.min(), side="left")
        stop = self._ids.search_sorted(pair_ids.max(), side="right")
        rows = pl.scan_parquet(self._path).slice(start, stop - start).collect()
        return rows.select(list(SCHEMA)).join(pair_ids.to_frame(), on="pair_id", how="semi")


class PairTokenizer:
    """Token ids of pairs as TRL 1.15 makes them: the answer starts where prompt and conversation diverge.

    Whole parts at once, and the prompt once instead of three times: tokenizers split a text at special tokens before
    anything else, so what stands before the last one in the prompt has the same ids whatever follows it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def rendered(self, pairs: pl.DataFrame) -> Rendered:
        """Pairs (pair_id, prompt, chosen, rejected) in the chat template."""
        conversations = [pairs[name].to_list() for name in ("prompt", "chosen", "rejected")]
        refused: dict[int, str] = {}
        try:
            texts = self._three(*conversations)
        except TemplateError:
            # Templates refuse what their model was not trained on, a system message for example. Those pairs only.
            texts = []
            for n, pair in enumerate(zip(*conversations, strict=True)):
                try:
                    texts += self._three(*([one] for one in pair))
                except TemplateError as error:
                    texts.append(("", "", ""))
                    refused[n] = str(error)
        pieces: list[str] = []
        for three in texts:
            cut = self._shared(*three)
            pieces += (three[0][:cut], three[0][cut:], three[1][cut:], three[2][cut:])
        return Rendered(pairs["pair_id"], pieces, refused)

    def encoded(self, part: Rendered) -> pl.DataFrame:
        """`tokens.parquet` for rendered pairs."""
        ids = self._ids(part.pieces)
        rows = [_row(ids[n] + ids[n + 1], ids[n] + ids[n + 2], ids[n] + ids[n + 3]) for n in range(0, len(ids), 4)]
        prompts, chosen, rejected = (_column([row.ids[n] for row in rows]) for n in range(3))
        faults = [TEMPLATE_BOUNDARY if row.boundary_fault else None for row in rows]
        for n, said in part.refused.items():
            faults[n] = f"{TEMPLATE_REFUSED}: {said}"
        return pl.DataFrame(dict(zip(SCHEMA, (part.pair_ids, prompts, chosen, rejected, faults), strict=True)), SCHEMA)

    def _three(
        self, prompts: list[Conversation], chosen: list[Conversation], rejected: list[Conversation]
    ) -> list[tuple[str, str, str]]:
        """(prompt, chosen conversation, rejected conversation) of each pair.

        Raises:
            TemplateError: the chat template refuses one of them.
        """
        answered = ([p + a for p, a in zip(prompts, side, strict=True)] for side in (chosen, rejected))
        good, bad = (self._texts(side, answer_follows=False) for side in answered)
        return list(zip(self._texts(prompts, answer_follows=True), good, bad, strict=True))

    def _texts(self, conversations: list[Conversation], *, answer_follows: bool) -> list[str]:
        if not conversations:
            return []
        texts: list[str] = self._tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=answer_follows
        )
        return texts

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


class _Row(NamedTuple):
    ids: tuple[Ids, Ids, Ids]  # Of the prompt and of both answers.
    boundary_fault: bool


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
