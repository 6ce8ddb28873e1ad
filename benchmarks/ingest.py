"""A million pairs from raw JSONL to a validated dataset, against the same rules written with `datasets`.

    python -m benchmarks.ingest [--rows 1000000] [--work FOLDER] [--only rules|tokens|scaling|again]
                                [--tokenizer FOLDER] [--token-rows 200000]

Prints one JSON object, and writes benchmarks/results/ingest.json and docs/images/ingest.png. Every arm runs in a
process of its own, so that peak memory is its own: the highest sum of proportional memory (PSS) of the process and its
children, measured every 200 ms. Seconds are wall time; `cpu` is user + system of the whole tree.

The rules of both arms: strict JSON, alternating roles, no blank message, no NUL, NFC, chosen unlike rejected after
folding, exact duplicates, contradictions, personal data and template marks flagged, near duplicates, a split by opening
message; with `tokens`, the chat template, prompts that fill `max_length` and answers that are equal once cut, too. The
`datasets` arm has them as Python functions in `map` and `filter` with `num_proc=2`, as a user would write them; its
near duplicates are those of equal folded text, which is less work than ours, and it tokenizes as TRL's trainers do.

The rows are words of the built-in OpenAssistant conversations, as often as they stand there, in random order.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from dpo_assets.artifact import ArtifactTree
from dpo_assets.assets.base_model import BUILTIN_MODELS
from dpo_assets.feedback.sources.finding import BUILTIN_FEEDBACK
from dpo_assets.hashing import file_sha256

ROWS = 1_000_000
RESULT = Path(__file__).parent / "results" / "ingest.json"
PLOT = Path(__file__).parent.parent / "docs" / "images" / "ingest.png"
SEED = 7
MAX_LENGTH = 1024  # Tokens of a pair.
SCALES = (10_000, 30_000, 100_000, 300_000, 1_000_000)


def words() -> list[str]:
    """The words of the built-in OpenAssistant conversations, each as often as it stands there."""
    texts: list[str] = []

    def walk(message: dict[str, Any]) -> None:
        texts.append(message["text"])
        for reply in message.get("replies", []):
            walk(reply)

    source = resources.files("dpo_assets") / BUILTIN_FEEDBACK["oasst"]
    for line in source.read_text("utf-8").splitlines():
        walk(json.loads(line)["prompt"])
    return [word for text in texts for word in text.split()]


def write_rows(path: Path, rows: int, start: int = 0) -> None:
    """About 1 KB a row. One in 100 repeats an earlier row, one in 200 nearly so, one in 500 turns one round; one in
    200 is damaged, one in 20 has letters outside ASCII, one in 100 an e-mail address."""
    vocabulary = words()
    draw = random.Random(f"{SEED}:{start}")
    earlier: list[dict[str, Any]] = []

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(least, most))) + "."

    with path.open("w", encoding="utf-8") as handle:
        for n in range(start, start + rows):
            kind = draw.random()
            if earlier and kind < 0.01:
                row = {**draw.choice(earlier), "id": f"row-{n}"}
            elif earlier and kind < 0.015:
                row = {**draw.choice(earlier), "id": f"row-{n}"}
                row["chosen"] += " ok"
            elif earlier and kind < 0.017:
                old = draw.choice(earlier)
                row = {**old, "chosen": old["rejected"], "rejected": old["chosen"], "id": f"row-{n}"}
            else:
                row = {"id": f"row-{n}", "prompt": text(12, 45), "chosen": text(35, 100), "rejected": text(25, 90)}
                if kind > 0.95:
                    row["chosen"] += " café naïve 日本語"
                if kind > 0.99:
                    row["prompt"] += f" write to user{n}@example.com"
                if len(earlier) < 20_000:
                    earlier.append(row)
            line = json.dumps(row, ensure_ascii=False)
            if 0.5 < kind < 0.505:
                line = line[: len(line) // 2]
            handle.write(line + "\n")


def ours(source: Path, work: Path, tokenizer: Path | None) -> dict[str, Any]:
    """Raw file to train and eval Parquet, by the functions behind the assets, artefacts included."""
    import polars as pl

    from dpo_assets.artifact import fingerprint
    from dpo_assets.feedback.batches import COUNTS, QUARANTINE, PairWriter
    from dpo_assets.feedback.library import read_into
    from dpo_assets.feedback.pair import PAIR_COLUMNS, QUARANTINE_COLUMNS, TOKEN_COLUMNS, polars_schema
    from dpo_assets.feedback.pool import parts_with_tokens, stored
    from dpo_assets.feedback.readers import ReadOptions
    from dpo_assets.feedback.screening import Screening
    from dpo_assets.feedback.sources import files_of
    from dpo_assets.feedback.splits import fit_to_model, split
    from dpo_assets.recipe import FeedbackSource

    tree = ArtifactTree(work)
    started = time.perf_counter()
    files = files_of([FeedbackSource(path=str(source / "*.jsonl"), format="trl")])
    read = [read_into(tree, file, ReadOptions()) for file in files]
    batches = [batch for one in read for batch in one.batches]
    read_seconds = time.perf_counter() - started

    def build(folder: Path) -> None:
        screening = Screening(stored([batch.path for batch in batches]))
        faults: list[dict[str, Any]] = []

        def fitted() -> Iterator[pl.DataFrame]:
            if tokenizer is None:
                yield from (part for part, _ in screening.parts())
                return
            screened = work / "screened.parquet"
            with PairWriter(screened) as writer:
                for part, _ in screening.parts():
                    writer.write(part)
            for part, ids in parts_with_tokens(screened, tokenize(screened, tokenizer, tree)):
                accepted, unfit = fit_to_model(part, ids, MAX_LENGTH)
                faults.extend(unfit)
                yield accepted

        schema = polars_schema(PAIR_COLUMNS if tokenizer is None else (*PAIR_COLUMNS, *TOKEN_COLUMNS))
        with (
            PairWriter(folder / "train.parquet", schema) as train,
            PairWriter(folder / "eval.parquet", schema) as held_out,
        ):
            for part in fitted():
                for writer, side in zip((train, held_out), split(part, 0.1, 0), strict=True):
                    writer.write(side)
        unfit_rows = pl.DataFrame(faults, schema=polars_schema(QUARANTINE_COLUMNS))
        read_rows = [pl.read_parquet(b.path / QUARANTINE) for b in batches]
        rejected = pl.concat([*read_rows, screening.quarantine(), unfit_rows])
        rejected.sort("source", "line", "row", "reason").write_parquet(folder / "quarantine.parquet")
        counts = {
            "rows_in": sum(b.json(COUNTS)["rows_in"] for b in batches),
            "accepted": train.rows + held_out.rows,
            "quarantined": rejected.height,
            "duplicates": screening.duplicates,
            "reasons": dict(rejected["reason"].value_counts().sort("reason").iter_rows()),
        }
        (folder / "counts.json").write_text(json.dumps(counts))

    found, reused = tree.find_or_build(
        "validated", fingerprint("validated", [b.digest for b in batches], {}), build, {}
    )
    counts = json.loads((found.path / "counts.json").read_text())
    assert counts["rows_in"] == counts["accepted"] + counts["quarantined"] + counts["duplicates"], counts
    return {
        "read_seconds": read_seconds,
        "batches_read": sum(one.new for one in read),
        "reused": reused,
        "digest": found.digest,
        **counts,
    }


def tokenize(pairs: Path, tokenizer: Path, tree: ArtifactTree) -> Path:
    """The worker's stage, as the asset starts it: what was tokenized before is not again."""
    from dpo_assets.artifact import fingerprint
    from dpo_assets.contract import TOKENS, TokenizeSpec

    inputs, print_ = {"base_model": str(tokenizer)}, fingerprint("tokens", file_sha256(pairs), {})
    earlier = tree.latest("tokens", inputs)

    def build(folder: Path) -> None:
        spec = TokenizeSpec(
            kind="tokens",
            output_dir=folder,
            fingerprint=print_,
            inputs=inputs,
            base_model=tokenizer,
            pairs=pairs,
            known=(earlier.path / TOKENS,) if earlier else (),
        )
        path = tree.root / "tokenize.json"
        path.write_text(spec.model_dump_json())
        command = [sys.executable, "-m", "dpo_assets.training", "tokenize", "--spec", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return tree.find_or_build("tokens", print_, build, inputs)[0].path / TOKENS


def with_datasets(source: Path, work: Path, tokenizer: Path | None) -> dict[str, Any]:
    """The same rules as a user writes them with `datasets.map` and `filter`."""
    import datasets

    datasets.disable_progress_bars()
    from benchmarks import ingest_rules as rules

    started = time.perf_counter()
    lines = datasets.load_dataset(
        "text", data_files=str(source / "*.jsonl"), split="train", cache_dir=str(work / "cache"), keep_linebreaks=False
    )
    rows_in = lines.num_rows
    parsed = lines.map(rules.parse, num_proc=2, remove_columns=["text"])
    read_seconds = time.perf_counter() - started
    quarantine = parsed.filter(rules.is_faulty, input_columns=["fault"], num_proc=2)
    sound = parsed.filter(rules.is_sound, input_columns=["fault"], num_proc=2)
    duplicates, conflicts, near = rules.across(sound)
    out = duplicates | conflicts | near
    kept = sound.filter(rules.is_kept, input_columns=["fault"], with_indices=True, num_proc=2, fn_kwargs={"out": out})
    if tokenizer is not None:
        own = {"folder": str(tokenizer), "max_length": MAX_LENGTH}
        tokens = kept.map(rules.tokenize, num_proc=2, fn_kwargs=own)
        unfit = tokens.filter(rules.is_faulty, input_columns=["fault"], num_proc=2)
        kept = tokens.filter(rules.is_sound, input_columns=["fault"], num_proc=2)
        unfit.to_parquet(work / "unfit.parquet")
    train = kept.filter(rules.is_train, input_columns=["group_id"], num_proc=2)
    held_out = kept.filter(rules.is_eval, input_columns=["group_id"], num_proc=2)
    train.to_parquet(work / "train.parquet")
    held_out.to_parquet(work / "eval.parquet")
    quarantine.to_parquet(work / "quarantine.parquet")
    accepted = train.num_rows + held_out.num_rows
    return {
        "read_seconds": read_seconds,
        "rows_in": rows_in,
        "accepted": accepted,
        "quarantined": quarantine.num_rows + len(conflicts) + len(near) + (unfit.num_rows if tokenizer else 0),
        "duplicates": len(duplicates),
    }


ARMS: dict[str, Callable[[Path, Path, Path | None], dict[str, Any]]] = {"ours": ours, "datasets": with_datasets}


def child(arm: str, source: Path, work: Path, tokenizer: Path | None) -> None:
    """One arm, in this process: result, seconds, processor time."""
    started = time.perf_counter()
    result = ARMS[arm](source, work, tokenizer)
    seconds = time.perf_counter() - started
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in usage)
    print(json.dumps({"arm": arm, "seconds": seconds, "cpu": cpu, **result}))


def measured(arm: str, source: Path, work: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """One arm, in a process of its own, with the peak memory of its whole tree."""
    import psutil

    command = [sys.executable, "-m", "benchmarks.ingest", "--child", arm, "--source", str(source), "--work", str(work)]
    command += ["--tokenizer", str(tokenizer)] if tokenizer else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not done.wait(0.2):
            total = 0
            try:
                for one in [root, *root.children(recursive=True)]:
                    try:
                        memory = one.memory_full_info()
                        total += memory.pss
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        continue
            except psutil.NoSuchProcess:
                break
            peak = max(peak, total)

    thread = threading.Thread(target=watch)
    thread.start()
    out, _ = process.communicate()
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{arm} ended with {process.returncode}")
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    size = sum(path.stat().st_size for path in source.glob("*.jsonl"))
    return {
        **result,
        "peak_gib": round(peak / 2**30, 3),
        "raw_gib": round(size / 2**30, 3),
        "rows_per_second": round(result["rows_in"] / result["seconds"]),
    }


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Seconds against rows, both logarithmic, with the line of constant cost per row through the last point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    rows, cpu = [p["rows_in"] for p in points], [p["cpu"] for p in points]
    axes.plot(rows, cpu, "o-", label="processor seconds")
    axes.plot(rows, [p["seconds"] for p in points], "s-", label="wall seconds")
    axes.plot(rows, [cpu[-1] * r / rows[-1] for r in rows], "--", color="grey", label="linear")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rows")
    axes.legend()
    figure.savefig(path)


def again(source: Path, work: Path, rows: int, tokenizer: Path | None = None) -> dict[str, Any]:
    """First ingest, the same files again, and 1 % more rows: in a file of their own, and at the end of the first."""
    first = measured("ours", source, work, tokenizer)
    second = measured("ours", source, work, tokenizer)
    write_rows(source / "more.jsonl", rows // 100, start=10_000_000)
    more = measured("ours", source, work, tokenizer)
    (source / "more.jsonl").unlink()
    path = source / "pairs.jsonl"
    size = path.stat().st_size
    extra = source / "extra.part"
    write_rows(extra, rows // 100, start=20_000_000)
    with path.open("ab") as handle, extra.open("rb") as more_rows:
        shutil.copyfileobj(more_rows, handle)
    extra.unlink()
    appended = measured("ours", source, work, tokenizer)
    with path.open("ab") as handle:
        handle.truncate(size)
    assert second["digest"] == first["digest"]
    assert second["reused"]
    assert second["batches_read"] == 0
    return {"first": first, "second": second, "new_file": more, "appended": appended}


def against(source: Path, base: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Both arms over the same rows, one after the other."""
    arms: dict[str, Any] = {}
    for arm in ARMS:
        work = _fresh(base / f"work-{arm}")
        arms[arm] = measured(arm, source, work, tokenizer)
        shutil.rmtree(work)
        print(json.dumps(arms[arm]), file=sys.stderr)
    ours, theirs = arms["ours"], arms["datasets"]
    return arms | {
        "times_faster": round(theirs["seconds"] / ours["seconds"], 2),
        "times_less_cpu": round(theirs["cpu"] / ours["cpu"], 2),
    }


def rows_in(base: Path, rows: int) -> Path:
    """A folder with one file of so many rows."""
    source = base / f"raw-{rows}"
    if not (source / "pairs.jsonl").exists():
        write_rows(_fresh(source) / "part", rows)
        (source / "part").rename(source / "pairs.jsonl")
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--token-rows", type=int, default=ROWS // 5)
    parser.add_argument("--tokenizer", type=Path, help="folder of a model; default: the built-in one")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", choices=["rules", "tokens", "scaling", "again"])
    parser.add_argument("--child", choices=sorted(ARMS))
    parser.add_argument("--source", type=Path)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.source, given.work, given.tokenizer)
        return
    base = given.work or Path(tempfile.mkdtemp(prefix="ingest-"))
    report: dict[str, Any] = {}
    try:
        if given.only in (None, "rules"):
            report["rules"] = against(rows_in(base, given.rows), base)
        model = given.tokenizer or Path(str(resources.files("dpo_assets") / BUILTIN_MODELS["stories260k"][0]))
        if given.only in (None, "tokens"):
            report["tokens"] = against(rows_in(base, given.token_rows), base, model)
        if given.only in (None, "again"):
            report["again"] = again(rows_in(base, given.rows), _fresh(base / "work-again"), given.rows)
            few = rows_in(base, given.token_rows)
            report["again_with_tokens"] = again(few, _fresh(base / "work-again"), given.token_rows, model)
        if given.only in (None, "scaling"):
            report["scaling"] = [_scale(base, rows) for rows in SCALES if rows <= given.rows]
            plot(report["scaling"], PLOT)
    finally:
        if given.work is None:
            shutil.rmtree(base, ignore_errors=True)
    text = json.dumps(report, indent=1)
    if given.only is None:
        RESULT.write_text(text + "\n")
    print(text)


def _scale(base: Path, rows: int) -> dict[str, Any]:
    result = measured("ours", rows_in(base, rows), _fresh(base / "work-scale"))
    print(json.dumps(result), file=sys.stderr)
    return result


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
