"""What a refresh of a few new pairs costs beside very many old ones, from the sensor's tick to the plan.

    python -m benchmarks.million [--rows 10000 100000 1000000] [--new 1000] [--work FOLDER] [--seeded]

For each number of rows: a first run of everything up to `dpo_plan`, then a file with `--new` rows beside the old one,
the sensor's tick, and the run that it asks for; then as many rows at the end of the old file, and the same again.
Each run is a process of its own (`dagster job execute`, steps in processes too), as a daemon starts it. Prints one JSON
object: wall seconds of tick, run and each step, processor seconds of the run (which say more where the machine does
other work), and the highest sum of proportional memory (PSS) of the run's processes while the step ran, measured every
200 ms.

Rows are those of `benchmarks.ingest`, about 1 KB each. `--seeded`: what the first run finds in the store, in place of
reading and tokenizing a million rows for more than ten minutes (`benchmarks.million_seeds`). The refreshes that are
measured do everything themselves, on what the first run left.
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
from pathlib import Path
from typing import Any

import dagster as dg

from benchmarks.ingest import write_rows
from dpo_assets.assets.pipeline import Pipeline
from dpo_assets.automation import new_feedback_sensor, refresh_job
from dpo_assets.demo.run import INSTANCE_CONFIG
from dpo_assets.recipe import parse_recipe
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.pipelines import demo_recipe

NAME = "many"
STEPS = ("base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset", "dpo_plan")
LOCATION = """\
import json
import dagster as dg
from dpo_assets import build_dpo_defs
job = dg.define_asset_job("to_plan", selection=dg.AssetSelection.assets(*([{name!r}, one] for one in {steps!r})))
defs = dg.Definitions.merge(
    build_dpo_defs({name!r}, json.load(open({recipe!r}))), dg.Definitions(jobs=[job])
)
"""


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


def of_rows(rows: int, new: int, base: Path, seeded: bool) -> dict[str, Any]:
    """First run and both refreshes beside so many old rows."""
    home = base / f"home-{rows}"
    shutil.rmtree(home, ignore_errors=True)
    feedback = home / "feedback"
    feedback.mkdir(parents=True)
    (home / "dagster.yaml").write_text(INSTANCE_CONFIG, encoding="utf-8")
    recipe = demo_recipe(
        feedback={
            "sources": [{"path": str(feedback / "*.jsonl"), "format": "trl"}],
            "eval_fraction": 0.1,
            "max_length": 512,
            "max_quarantine_rate": 1.0,
        }
    )
    (home / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    location = home / "location.py"
    said = {"name": NAME, "recipe": str(home / "recipe.json"), "steps": STEPS}
    location.write_text(LOCATION.format(**said), encoding="utf-8")
    if seeded:
        command = [sys.executable, "-m", "benchmarks.million_seeds", "--home", str(home), "--rows", str(rows)]
        measured(command, home)
    else:
        write_rows(feedback / "old.jsonl", rows)
    row: dict[str, Any] = {"rows": rows, "first": run(home, location)}
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
    parser.add_argument("--seeded", action="store_true")
    parser.add_argument("--tick", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tick:
        tick_of(given.tick)
        return
    base = given.work or Path(tempfile.mkdtemp(prefix="million-"))
    try:
        found = [of_rows(rows, given.new, base, given.seeded) for rows in given.rows]
    finally:
        if given.work is None:
            shutil.rmtree(base, ignore_errors=True)
    report: dict[str, Any] = {"new": given.new, "seeded": given.seeded, "rows": found}
    for way in ("new_file", "appended"):
        for what in ("seconds", "cpu"):
            whole = [one[way]["tick"] + one[way][what] for one in found]
            report[f"{way}_{what}_growth"] = round(whole[-1] / whole[0], 2)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
