"""Kills the demo's training stages at random moments: is what the next try makes bit-equal, and what was done twice?

    python -m benchmarks.kills --kills 20

Runs the demo up to its adapter once, in a folder of its own, and keeps the specs that its workers were given. Then each
of the stages is started anew, killed with SIGKILL at a random moment after a random step, or before the first, started
again, and its adapter, metric log and report are compared with the first run's byte by byte.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets import LocalLauncher
from dpo_assets.contract import Spec, Stage, TrainSpec
from dpo_assets_tests.pipelines import DATA, demo_recipe, failures, materialize, short_recipe

NODES = {"sft": "sft_checkpoint", "dpo": "dpo_adapter"}
COMPARED = ("adapter/adapter_model.safetensors", "metrics.jsonl", "report.json")
PATIENCE = 600.0


class Recording(LocalLauncher):
    """Keeps the spec of every stage that it runs, in `folder`."""

    folder: str

    def run(
        self, context: dg.AssetExecutionContext, stage: Stage, spec: Spec, timeout_seconds: float, silent_seconds: float
    ) -> None:
        (Path(self.folder) / f"{stage}.json").write_text(spec.model_dump_json(), encoding="utf-8")
        super().run(context, stage, spec, timeout_seconds, silent_seconds)


@dataclass(frozen=True)
class Trained:
    """A stage of the demo as it ran undisturbed: its spec, its artefact, and the steps that it took."""

    stage: str
    spec: TrainSpec
    artefact: Path
    steps: int
    seconds: float


@dataclass(frozen=True)
class Killed:
    """What a kill led to."""

    at: int  # Steps that were done.
    equal: bool
    again: int  # Steps that were done twice.
    share_writing: float  # Of the second try's time.


def trained(work: Path, recipe: Mapping[str, Any]) -> list[Trained]:
    """Runs the demo up to its adapter."""
    home, specs = work / "home", work / "specs"
    for folder in (home, specs):
        folder.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        resources = {"launcher": Recording(folder=str(specs))}
        made = materialize(recipe, instance, [*DATA, "dpo_plan", *NODES.values()], resources=resources)
        if not made.success:
            raise SystemExit("\n".join(failures(made)))
    found = []
    for stage, node in NODES.items():
        spec = TrainSpec.model_validate_json((specs / f"{stage}.json").read_bytes())
        artefact = spec.output_dir.with_name(spec.fingerprint)
        assert artefact.parent.name == node
        steps, seconds = (
            json.loads((artefact / file).read_bytes())[name]
            for file, name in (("report.json", "steps"), ("timings.json", "seconds"))
        )
        found.append(Trained(stage, spec, artefact, steps, seconds))
    return found


def killed(one: Trained, at: int, later: float, work: Path) -> Killed:
    """Starts a stage, kills it `later` seconds after `at` steps are done, and lets another process finish it."""
    assert one.spec.checkpoints is not None
    kept = work / "checkpoints"
    checkpoints = one.spec.checkpoints.model_copy(update={"folder": kept})
    spec = one.spec.model_copy(update={"output_dir": work / "out", "checkpoints": checkpoints})
    process = _start(one.stage, spec, work)
    deadline = time.monotonic() + PATIENCE
    while _reached(kept) < at and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(later)
    process.kill()
    process.wait()
    done = _reached(kept)
    if _start(one.stage, spec, work).wait(PATIENCE):
        raise SystemExit((work / "log").read_text(encoding="utf-8"))
    equal = all((spec.output_dir / name).read_bytes() == (one.artefact / name).read_bytes() for name in COMPARED)
    told = json.loads((spec.output_dir / "timings.json").read_bytes())
    share = told["seconds_held_up_by_checkpoints"] / told["seconds"]
    return Killed(done, equal, told["steps_done_twice"], share)


def _start(stage: str, spec: TrainSpec, work: Path) -> subprocess.Popen[bytes]:
    shutil.rmtree(spec.output_dir, ignore_errors=True)
    spec.output_dir.mkdir(parents=True)
    (work / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "dpo_assets.training", stage, "--spec", str(work / "spec.json")]
    with (work / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _reached(kept: Path) -> int:
    try:
        return int((kept / "reached").read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


def main() -> None:
    """Prints a line a kill, and the worst of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each stage in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="the demo's short pairs alone")
    args = parser.parse_args()
    chosen = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        stages = trained(Path(folder), short_recipe() if args.short else demo_recipe())
        results: list[tuple[Trained, Killed]] = []
        for number in range(args.kills):
            one = stages[number % len(stages)]
            work = Path(folder) / f"kill-{number}"
            work.mkdir()
            later = chosen.uniform(0.0, one.seconds / one.steps)  # Longer than a step: loading is in it.
            result = killed(one, chosen.randint(0, one.steps), later, work)
            results.append((one, result))
            print(
                f"{one.stage}: killed after step {result.at} of {one.steps}, "
                f"{'bit-equal' if result.equal else 'DIFFERENT'}, {result.again} steps twice "
                f"({100 * result.again / one.steps:.1f} %), checkpoints {100 * result.share_writing:.1f} % of the time",
                flush=True,
            )
    worst = max(result.again / one.steps for one, result in results)
    held = max(result.share_writing for _, result in results)
    equal = sum(result.equal for _, result in results)
    print(
        f"{equal} of {len(results)} bit-equal; at most {100 * worst:.1f} % of a stage's steps done twice, and "
        f"{100 * held:.1f} % of its time spent on checkpoints"
    )
    if equal < len(results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
