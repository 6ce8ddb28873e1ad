"""Near duplicates: pairs whose prompt, chosen and rejected answers each say nearly the same.

MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3), over runs
of three tokens. A token is a run of ASCII letters and digits without regard to case, or one character of any other
script. Nothing but arrays is touched: 20 microseconds a pair, and a library that hashes word by word takes ten times
that. Hashes only propose; two pairs are near duplicates by the exact measure, `similarity`.

The cost is bounded: per pair one signature, and at most COMPARED comparisons, with the pairs it shares most bands with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

BANDS, BAND_ROWS = 8, 4  # A pair of similarity 0.85 shares a band with a chance of 0.998; one of 0.5 with one of 0.4.
BAND_COLUMNS = tuple(f"band_{n}" for n in range(BANDS))
COMPARED = 2
SHINGLE = 3
LONG_ANSWERS = 32  # Tokens; shorter answers are common ones ("Yes."), and only the prompt tells their pairs apart.
_BLOCK = 256  # Conversations hashed at once: what is made of them stays in the processor's cache.
_TOKEN = re.compile(r"[a-z0-9]+|[^\x00-\x7f]")


def band_frame(pairs: pl.DataFrame) -> pl.DataFrame:
    """BAND_COLUMNS of a table of pairs. Pairs that share a value in one of them may be near duplicates.

    A pair without a single token has nulls.
    """
    import numpy as np
    import polars as pl

    height = pairs.height
    lowest = np.full((BANDS * BAND_ROWS, height), _NOTHING, dtype=np.uint64)
    counts = np.zeros(height, dtype=np.int64)
    for salt, name in enumerate(("chosen", "rejected"), start=1):
        counts += _lower(lowest, pairs[name], salt, np.arange(height))
    short = np.flatnonzero(counts < LONG_ANSWERS)
    if short.size:
        counts[short] += _lower(lowest, pairs["prompt"][short.tolist()], 3, short)
    keys = np.zeros((BANDS, height), dtype=np.uint64)
    odd = _odd_numbers(BANDS * BAND_ROWS)
    for band in range(BANDS):
        for row in range(BAND_ROWS):
            n = band * BAND_ROWS + row
            keys[band] = _mixed((keys[band] ^ lowest[n]) * odd[n])
    some = counts > 0
    return pl.DataFrame(
        {
            name: pl.Series(keys[n]).zip_with(pl.Series(some), pl.Series([None], dtype=pl.UInt64))
            for n, name in enumerate(BAND_COLUMNS)
        }
    )


_NOTHING = 2**64 - 1


def _lower(lowest: Words, column: pl.Series, salt: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Takes the smallest hashes of a column's conversations into `lowest[:, rows]`; tokens of each."""
    import numpy as np

    odd = _odd_numbers(BANDS * BAND_ROWS)
    all_counts = []
    for begin in range(0, column.len(), _BLOCK):
        shingles, starts, counts = _shingles(column.slice(begin, _BLOCK), salt)
        all_counts.append(counts)
        filled = np.flatnonzero(counts)
        if not filled.size:
            continue
        into, places = rows[begin + filled], starts[filled]
        for n in range(BANDS * BAND_ROWS):
            smallest = np.minimum.reduceat(shingles * odd[n], places)
            lowest[n, into] = np.minimum(lowest[n, into], smallest)
    return np.concatenate(all_counts) if all_counts else np.zeros(0, dtype=np.int64)


def _shingles(column: pl.Series, salt: int) -> tuple[Words, NDArray[np.int64], NDArray[np.int64]]:
    """(hashes of all runs of SHINGLE tokens, first of each conversation, tokens of each conversation)."""
    texts = column.list.explode(keep_nulls=False, empty_as_null=False).struct.field("content")
    return _runs_of(*_tokens(texts, column.list.len()), SHINGLE, salt)


def run_hashes(texts: Sequence[str] | pl.Series, length: int) -> tuple[Words, NDArray[np.int64], NDArray[np.int64]]:
    """(hashes of runs of `length` tokens, first of each text, number of each text).

    One run begins at every token of a text; those at its end are shorter.
    """
    import polars as pl

    column = texts if isinstance(texts, pl.Series) else pl.Series(texts, dtype=pl.String)
    return _runs_of(*_tokens(column, pl.repeat(1, column.len(), eager=True)), length, 0)


def tokens_of(text: str) -> list[str]:
    """The tokens of a text, as they are hashed."""
    return _TOKEN.findall(text.lower()) if text.isascii() else _TOKEN.findall(_lower_ascii(text))


def _lower_ascii(text: str) -> str:
    return text.translate({n: n + 32 for n in range(ord("A"), ord("Z") + 1)})


def _runs_of(
    tokens: Words, counts: NDArray[np.int64], length: int, salt: int
) -> tuple[Words, NDArray[np.int64], NDArray[np.int64]]:
    import numpy as np

    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)[:-1]]) if counts.size else counts
    owner = np.repeat(np.arange(counts.size), counts)
    odd = _odd_numbers(32)
    total = tokens * odd[0]
    for step in range(1, min(length, max(1, tokens.size))):
        # The last tokens of a text make shorter runs: so one of few tokens has hashes too.
        same = owner[step:] == owner[:-step]
        total[:-step] += np.where(same, tokens[step:] * odd[step], np.uint64(0))
    return _mixed(total + odd[24 + salt]), starts, counts


def _tokens(texts: pl.Series, sizes: pl.Series) -> tuple[Words, NDArray[np.int64]]:
    """(hash of every token, number of tokens of each group of `sizes` texts)."""
    import numpy as np

    groups = sizes.to_numpy().astype(np.int64)
    nothing = np.zeros(0, dtype=np.uint64), np.zeros(groups.size, dtype=np.int64)
    if not texts.len():
        return nothing
    offsets, text = _buffers(texts.rechunk().to_arrow(compat_level=_oldest()))
    if not text.size:
        return nothing
    kind, letter, neighbours = _alphabet()
    is_kind = kind[text]
    word = is_kind == 1
    begins = is_kind == 2
    begins[1:] |= word[1:] & ~word[:-1]
    begins[0] |= word[0]
    inner = offsets[:-1][offsets[:-1] < text.size]
    begins[inner] |= word[inner]
    places = np.flatnonzero(begins)
    if not places.size:
        return nothing
    # The hash of a token is the sum of the hashes of its neighbouring letters.
    low = letter[text]
    index = low.astype(np.uint16) << 8
    index[1:] |= np.where(begins[1:], 0, low[:-1])
    hashes = _mixed(np.add.reduceat(neighbours[index], places))
    ends = offsets[np.cumsum(groups)]
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.searchsorted(places, ends, side="left")])
    return hashes, np.diff(before)


def _oldest() -> Any:
    import polars as pl

    return pl.CompatLevel.oldest()


def _buffers(arrow: Any) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(offsets, bytes) of an Arrow column of large strings, counted from its first string."""
    import numpy as np

    _, places, data = arrow.buffers()
    offsets = np.frombuffer(places, dtype=np.int64)[arrow.offset : arrow.offset + len(arrow) + 1]
    text = np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]] if data is not None else np.zeros(0, np.uint8)
    return offsets - offsets[0], text


@cache
def _alphabet() -> tuple[NDArray[np.uint8], NDArray[np.uint8], Words]:
    """By byte: 1 for letters and digits, 2 for the first byte of another character, 3 for its others; lower case; and
    the hash of two neighbours. 0 is what separates tokens, and adds nothing."""
    import numpy as np

    kind, letter = np.zeros(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)
    for byte in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
        kind[byte] = 1
    kind[0xC0:], kind[0x80:0xC0] = 2, 3
    letter[ord("A") : ord("Z") + 1] += 32
    letter[kind == 0] = 0
    hashes = np.random.default_rng(20250629).integers(0, 2**64, size=2**16, dtype=np.uint64)
    hashes[:256] = 0  # The high byte is the letter itself: a separator.
    return kind, letter, hashes


@cache
def _odd_numbers(count: int) -> Words:
    import numpy as np

    return np.random.default_rng(1997).integers(0, 2**64, size=64, dtype=np.uint64)[:count] | np.uint64(1)


def _mixed(values: Words) -> Words:
    """The finaliser of MurmurHash3."""
    import numpy as np

    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    return values ^ (values >> np.uint64(33))


def candidates(bands: Iterable[pl.Series], rank: pl.Series) -> pl.DataFrame:
    """(n, other): rows to compare, `other` the one that stays, in the order of `n`'s rank.

    In each band a pair is held against the first of those that share its value, in the order of ranks, so that nothing
    depends on the order of rows.

    Args:
        bands: the BAND_COLUMNS, one after the other.
        rank: the place of each row in an order that depends on content alone.
    """
    import polars as pl

    found = []
    for values in bands:
        band = pl.DataFrame({"value": values, "rank": rank}).drop_nulls()
        band = band.filter(pl.col("value").is_duplicated())
        band = band.with_columns(first=pl.col("rank").min().over("value")).filter(pl.col("rank") > pl.col("first"))
        found.append(band.select("rank", "first"))
    shared = pl.concat(found).group_by("rank", "first").len()
    best = shared.sort("rank", "len", "first", descending=[False, True, False])
    best = best.group_by("rank", maintain_order=True).head(COMPARED)
    row = rank.arg_sort()
    return pl.DataFrame({"n": row.gather(best["rank"]), "other": row.gather(best["first"])})


class Compared:
    """Pairs that were held against each other before, by their ids, which are their content: are they near?

    Args:
        known: a table (`compared_schema`) of an earlier run, by the same measure and the same least similarity.
    """

    def __init__(self, known: pl.DataFrame | None = None) -> None:
        self._known = known
        self._used: list[pl.DataFrame] = []
        self._new: list[tuple[int, int, int, int, bool]] = []

    def of(self, ones: pl.DataFrame, others: pl.DataFrame) -> pl.Series:
        """`near`, row for row: whether two pairs are near, null where nobody knows. Both tables are of two numbers."""
        import polars as pl

        if self._known is None or ones.is_empty():
            return pl.Series("near", [None] * ones.height, dtype=pl.Boolean)
        names = list(compared_schema())
        asked = pl.DataFrame([*ones.iter_columns(), *others.rename(lambda name: f"other_{name}").iter_columns()])
        asked.columns = names[:4]
        found = asked.join(self._known, on=names[:4], how="left", maintain_order="left")
        self._used.append(found.drop_nulls())
        return found["near"]

    def add(self, one: tuple[int, ...], other: tuple[int, ...], near: bool) -> None:
        self._new.append((one[0], one[1], other[0], other[1], near))

    def table(self) -> pl.DataFrame:
        """All that was asked for and is known by now, in an order of its own."""
        import polars as pl

        new = pl.DataFrame(self._new, schema=compared_schema(), orient="row")
        names = list(compared_schema())
        return pl.concat([new, *self._used]).unique(names[:4]).sort(names[:4])


@cache
def compared_schema() -> pl.Schema:
    """Ids of two pairs, as two numbers each, and whether they are near duplicates."""
    import polars as pl

    ids = ("one_a", "one_b", "other_a", "other_b")
    return pl.Schema({**dict.fromkeys(ids, pl.UInt64()), "near": pl.Boolean()})


def similarity(one: dict[str, Any], other: dict[str, Any], at_least: float = 0.0) -> float:
    """The least, over prompt, chosen and rejected, of the shared share (Jaccard) of runs of three tokens.

    Stops with 0 at the first that lies below `at_least`.
    """
    least = 1.0
    for name in ("chosen", "rejected", "prompt"):
        a, b = _runs(one[name]), _runs(other[name])
        union = len(a | b)
        shared = len(a & b) / union if union else float(_text(one[name]) == _text(other[name]))
        if shared < at_least:
            return 0.0
        least = min(least, shared)
    return least


def _text(messages: list[dict[str, str]]) -> str:
    return "\n".join(m["content"] for m in messages)


def _runs(messages: list[dict[str, str]]) -> set[tuple[str, ...]]:
    tokens = tokens_of(_text(messages))
    return {tuple(tokens[n : n + SHINGLE]) for n in range(len(tokens))}
