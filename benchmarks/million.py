"""What a refresh of a few new pairs costs beside very many old ones, from the sensor's tick to the plan.

    python -m benchmarks.million [--rows 10000 100000 1000000] [--new 1000] [--work FOLDER] [--made-tokens]

For each number of rows: a first run of everything up to `dpo_plan`, then a file with `--new` rows beside the old one,
the sensor's tick, and the run that it asks for; then as many rows at the end of the old file, and the same again.
Each run is a process of its own (`dagster job execute`, steps in processes too), as a daemon starts it. Prints one JSON
object: wall seconds of tick, run and each step, processor seconds of the run (which say more where the machine does
other work), and the highest sum of proportional memory (PSS) of the run's processes
while the step ran, measured every 200 ms.

Rows are those of `benchmarks.ingest`, about 1 KB each. `--made-tokens`: the first run's token ids are not the
tokenizer's but made of the texts' bytes, one of every four: a million pairs are tokenized in ten minutes, and no
refresh does that again. The refreshes that are measured tokenize their new rows as always.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from benchmarks.ingest import write_rows
from dpo_assets.artifact import write_json
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.automation import new_feedback_sensor, refresh_job
from dpo_assets.contract import CHAT_FORMAT, TOKENS, ChatFormatFacts, Spec, Stage, TokenizeSpec
from dpo_assets.demo.run import INSTANCE_CONFIG
from dpo_assets.feedback.pair import token_schema
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets.resources.launcher import LocalLauncher
from dpo_assets_tests.pipelines import demo_recipe

NAME = "many"
STEPS = ("base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset", "dpo_plan")
LOCATION = """\
import json
import dagster as dg
from dpo_assets import build_dpo_defs
from benchmarks.million import ByteTokens
job = dg.define_asset_job("to_plan", selection=dg.AssetSelection.assets(*([{name!r}, one] for one in {steps!r})))
defs = dg.Definitions.merge(
    build_dpo_defs({name!r}, json.load(open({recipe!r})), resources={resources}), dg.Definitions(jobs=[job])
)
"""


class ByteTokens(LocalLauncher):
    """Token ids made of the texts' bytes, one of every four, in the time that it takes to write them."""

    def run(
        self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float, silent_seconds: float
    ) -> None:
        if not isinstance(spec, TokenizeSpec):
            super().run(context, stage, spec, timeout_seconds, silent_seconds)
            return
        import pyarrow.parquet as pq

        with pq.ParquetFile(spec.pairs) as file, ExitStack() as stack:
            writer: Any = None
            for rows in file.iter_batches(1 << 14, columns=["pair_id", "prompt", "chosen", "rejected"]):
                made = byte_tokens(pl.DataFrame(rows)).to_arrow(compat_level=pl.CompatLevel.oldest())
                writer = writer or stack.enter_context(pq.ParquetWriter(spec.output_dir / TOKENS, made.schema))
                writer.write_table(made)
        write_json(spec.output_dir / CHAT_FORMAT, ChatFormatFacts(ends=(END,)).model_dump(mode="json"))


END = 2  # stories260K's end of a sequence.


def byte_tokens(pairs: pl.DataFrame) -> pl.DataFrame:
    """A table as the stage `tokenize` writes it; answers end with END."""
    columns: dict[str, Any] = {"pair_id": pairs["pair_id"]}
    for side in ("prompt", "chosen", "rejected"):
        texts = pairs[side].list.last().struct.field("content")
        cut = texts.str.encode("hex").to_list()
        ids = [np.frombuffer(bytes.fromhex(one), dtype=np.uint8)[::4].astype(np.int32) + 3 for one in cut]
        columns[f"{side}_ids"] = [one if side == "prompt" else np.append(one, END) for one in ids]
    return pl.DataFrame(columns | {"template_fault": [None] * pairs.height}, schema=token_schema())


def tick_of(home: Path) -> None:
    """Evaluates the sensor as the daemon does, and prints seconds, runs asked for, and why not."""
    os.environ["DAGSTER_HOME"] = str(home)
    pipeline = Pipeline(NAME, parse_recipe(json.loads((home / "recipe.json").read_text(encoding="utf-8"))))
    sensor = new_feedback_sensor(pipeline, refresh_job(pipeline))
    resources = {f"{NAME}_artifacts": ArtifactStore()}
    with (
        dg.DagsterInstance.get() as instance,
        dg.build_sensor_context(instance, None, resources=resources) as context,
    ):
        began = time.perf_counter()
        data: Any = sensor.evaluate_tick(context)
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "asked": len(data.run_requests or []), "said": str(data.skip_message)}))


def measured(command: list[str], home: Path) -> tuple[str, float, list[tuple[float, float]]]:
    """(output, wall seconds, (time, GiB of the process tree) every 200 ms)."""
    import psutil

    samples: list[tuple[float, float]] = []
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=os.environ | {"DAGSTER_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    done = threading.Event()

    def watch() -> None:
        root = psutil.Process(process.pid)
        while not done.wait(0.2):
            total = 0
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for one in family:
                try:
                    total += one.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            samples.append((time.time(), total / 2**30))

    thread = threading.Thread(target=watch)
    thread.start()
    out, _ = process.communicate()
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{out[-4000:]}")
    return out, time.monotonic() - began, samples


def run(home: Path, location: Path) -> dict[str, Any]:
    """One run to the plan: seconds and peak of the whole and of each step, and pairs that were tokenized."""
    command = [sys.executable, "-m", "dagster", "job", "execute", "-f", str(location), "-j", "to_plan"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, wall, samples = measured(command, home)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.environ["DAGSTER_HOME"] = str(home)
    steps: dict[str, Any] = {}
    with dg.DagsterInstance.get() as instance:
        [last] = instance.get_run_records(limit=1)
        began: dict[str, float] = {}
        said = ""
        for entry in instance.all_logs(last.dagster_run.run_id):
            said += f"{entry.user_message}\n"
            event, key = entry.dagster_event, entry.step_key
            if event is None or key is None:
                continue
            if event.event_type_value == "STEP_START":
                began[key] = entry.timestamp
            elif event.event_type_value == "STEP_SUCCESS":
                inside = [gib for at, gib in samples if began[key] <= at <= entry.timestamp]
                steps[key.removeprefix(f"{NAME}__")] = {
                    "seconds": round(entry.timestamp - began[key], 2),
                    "peak_gib": round(max(inside, default=0.0), 2),
                }
    again = re.findall(r"tokenize: (\d+) of (\d+) pairs were tokenized before", said)
    tokenized = sum(int(all_) - int(known) for known, all_ in again)
    return {
        "seconds": round(wall, 1),
        "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_gib": round(max((gib for _, gib in samples), default=0.0), 2),
        "tokenized": tokenized,
        "steps": steps,
    }


def tick(home: Path) -> float:
    """Seconds of the sensor's evaluation that asks for a run."""
    out, _, _ = measured([sys.executable, "-m", "benchmarks.million", "--tick", str(home)], home)
    said = json.loads(out.strip().splitlines()[-1])
    if not said["asked"]:
        raise SystemExit(f"the sensor asked for no run: {said['said']}")
    return round(float(said["seconds"]), 2)


def of_rows(rows: int, new: int, base: Path, made_tokens: bool) -> dict[str, Any]:
    """First run and both refreshes beside so many old rows."""
    home = base / f"home-{rows}"
    shutil.rmtree(home, ignore_errors=True)
    feedback = home / "feedback"
    feedback.mkdir(parents=True)
    (home / "dagster.yaml").write_text(INSTANCE_CONFIG, encoding="utf-8")
    write_rows(feedback / "old.jsonl", rows)
    recipe = demo_recipe(
        feedback={
            "sources": [{"path": str(feedback / "*.jsonl"), "format": "trl"}],
            "eval_fraction": 0.1,
            "max_length": 512,
            "max_quarantine_rate": 1.0,
        }
    )
    (home / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    location, first = home / "location.py", home / "first.py"
    said = {"name": NAME, "recipe": str(home / "recipe.json"), "steps": STEPS}
    location.write_text(LOCATION.format(**said, resources="{}"), encoding="utf-8")
    resources = '{"launcher": ByteTokens()}' if made_tokens else "{}"
    first.write_text(LOCATION.format(**said, resources=resources), encoding="utf-8")
    row: dict[str, Any] = {"rows": rows, "first": run(home, first)}
    print(json.dumps(row), file=sys.stderr)
    write_rows(feedback / "new.jsonl", new, start=10_000_000)
    time.sleep(6)  # The sensor lets a file settle.
    seconds = tick(home)
    row["new_file"] = {"tick": seconds, **run(home, location)}
    print(json.dumps(row["new_file"]), file=sys.stderr)
    write_rows(home / "more.part", new, start=20_000_000)
    with (feedback / "old.jsonl").open("ab") as handle:
        handle.write((home / "more.part").read_bytes())
    time.sleep(6)
    seconds = tick(home)
    row["appended"] = {"tick": seconds, **run(home, location)}
    print(json.dumps(row["appended"]), file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--new", type=int, default=1000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--made-tokens", action="store_true")
    parser.add_argument("--tick", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tick:
        tick_of(given.tick)
        return
    base = given.work or Path(tempfile.mkdtemp(prefix="million-"))
    try:
        found = [of_rows(rows, given.new, base, given.made_tokens) for rows in given.rows]
    finally:
        if given.work is None:
            shutil.rmtree(base, ignore_errors=True)
    report: dict[str, Any] = {"new": given.new, "made_tokens": given.made_tokens, "rows": found}
    for way in ("new_file", "appended"):
        for what in ("seconds", "cpu"):
            whole = [one[way]["tick"] + one[way][what] for one in found]
            report[f"{way}_{what}_growth"] = round(whole[-1] / whole[0], 2)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
