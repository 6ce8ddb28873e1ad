"""Hostile files in a process of their own: what they ask for does not show in its memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_assets_tests.feedback.sources.reading import row

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory as Linux tells it")
MIB = 2**20
# Rows of at most 4 MiB, cut, pushed back and parsed: a few copies of one, and the interpreter's own. What the files
# hold is larger by so much that one copy of it would show.
GROWTH = 150
# Of this process alone: `ru_maxrss` begins with what the process had that started it, which hides as much.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
"""
READ = """
import json, resource, sys
from pathlib import Path
from dpo_assets.feedback.readers import RowFault
from dpo_assets.feedback.sources import FileRefused, Limits, files_of, rows_of
from dpo_assets.recipe import FeedbackSource
import pyarrow.parquet

small, large = [FeedbackSource(path=path) for path in sys.argv[1:3]]
list(rows_of(files_of([small])[0]))  # Everything is imported now.
before = peak()
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
[file] = files_of([large], limits=Limits(unpacked_bytes=200 << 20))
good, faults, refused = 0, [], None
try:
    for row in rows_of(file):
        if isinstance(row.value, RowFault):
            faults.append(row.value.reason)
        else:
            good += 1
except FileRefused as error:
    refused = error.reason
grown = peak() - before
print(json.dumps({"good": good, "faults": sorted(set(faults)), "refused": refused, "grown": grown}))
"""


def memory_of(folder: Path, path: Path) -> dict[str, object]:
    (folder / "small.jsonl").write_bytes(row())
    told = subprocess.run(
        [sys.executable, "-c", PEAK + READ, str(folder / "small.jsonl"), str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert told.returncode == 0, told.stderr
    result: dict[str, object] = json.loads(told.stdout)
    return result


def written(path: Path, head: bytes, block: bytes, times: int, tail: bytes) -> Path:
    with path.open("wb") as target:
        target.write(head)
        for _ in range(times):
            target.write(block)
        target.write(tail)
    return path


BLOCK = b"x" * MIB


@pytest.mark.parametrize(
    ("name", "head", "block", "times", "tail", "good", "faults"),
    [
        ("one row of 250 MB.jsonl", row(0) + b'\n{"a": "', BLOCK, 250, b'"}\n' + row(2), 2, ["row_too_large"]),
        (
            "one value of 250 MB.json",
            b"[" + row(0) + b', {"a": "',
            BLOCK,
            250,
            b'"}, ' + row(2) + b"]",
            2,
            ["row_too_large"],
        ),
        ("no line end at all.jsonl", b"", BLOCK, 250, b"", 0, ["row_too_large"]),
        ("one cell of 250 MB.csv", b"prompt,chosen\na,b\n", BLOCK, 250, b",b\na,b\n", 2, ["row_too_large"]),
        (
            "an open quote.csv",
            b'prompt,chosen\n"a,b\n',
            b"c," + b"d" * 1021 + b"\n",
            8_192,
            b"",
            8_192,
            ["unclosed_quote"],
        ),
        ("a string that never ends.json", b'[{"a": "', BLOCK, 200, b"", 0, ["row_too_large"]),
        ("brackets only.json", b"[{", b"[" * MIB, 100, b"", 0, ["row_too_large"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_of_any_size_is_a_fault_in_bounded_memory(
    tmp_path: Path, name: str, head: bytes, block: bytes, times: int, tail: bytes, good: int, faults: list[str]
) -> None:
    result = memory_of(tmp_path, written(tmp_path / name.replace(" ", "_"), head, block, times, tail))
    assert (result["good"], result["faults"], result["refused"]) == (good, faults, None)
    assert isinstance(result["grown"], int)
    assert result["grown"] < GROWTH


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"bomb.jsonl.{packed}"
    zeros = b"0" * MIB
    if packed == "gz":
        with gzip.open(path, "wb") as target:
            for _ in range(300):
                target.write(zeros)
    else:
        zstandard = pytest.importorskip("zstandard")
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as target:
            for _ in range(300):
                target.write(zeros)
    assert path.stat().st_size < 2 * MIB
    result = memory_of(tmp_path, path)
    assert result["refused"] == "decompression_bomb"
    assert isinstance(result["grown"], int)
    assert result["grown"] < GROWTH


def test_a_parquet_file_of_repeated_text_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """It says that it is small, and it is: half a gigabyte of text is one value and 500 references to it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["x" * MIB]))
    options: dict[str, Any] = {"store_schema": False, "dictionary_pagesize_limit": 8 * MIB}
    pq.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet", **options)
    assert (tmp_path / "a.parquet").stat().st_size < 3 * MIB
    result = memory_of(tmp_path, tmp_path / "a.parquet")
    assert (result["good"], result["refused"]) == (500, None)
    assert isinstance(result["grown"], int)
    assert result["grown"] < GROWTH


def test_a_large_row_group_of_parquet_is_read_in_bounded_memory(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [os.urandom(700).hex() for _ in range(25_000)] for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=10**6, compression="none")
    assert (tmp_path / "a.parquet").stat().st_size > 100 * MIB
    result = memory_of(tmp_path, tmp_path / "a.parquet")
    assert (result["good"], result["refused"]) == (25_000, None)
    assert isinstance(result["grown"], int)
    assert result["grown"] < 80


INGEST = """
import json, sys
from pathlib import Path
from dpo_assets.artifact import ArtifactTree
from dpo_assets.feedback.library import read_into
from dpo_assets.feedback.readers import ReadOptions
from dpo_assets.feedback.sources import files_of
from dpo_assets.recipe import FeedbackSource

small, large = [files_of([FeedbackSource(path=path)])[0] for path in sys.argv[1:3]]
tree = ArtifactTree(Path(sys.argv[3]))
read_into(tree, small, ReadOptions())
before = peak()
read = read_into(tree, large, ReadOptions())
grown = peak() - before
row = read.row()
print(json.dumps({name: row[name] for name in ("rows", "rejected")} | {"grown": grown}))
"""


def test_a_small_archive_of_many_rows_costs_the_memory_of_a_batch(tmp_path: Path) -> None:
    (tmp_path / "small.jsonl").write_bytes(row())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" * 100_000, mtime=0))
    assert path.stat().st_size < 1_000
    told = subprocess.run(
        [sys.executable, "-c", PEAK + INGEST, str(tmp_path / "small.jsonl"), str(path), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    assert (result["rows"], result["rejected"]) == (100_000, 100_000)
    assert result["grown"] < 60
