"""Refreshes a pipeline 200 times by Dagster's daemon and its own sensor, and audits each.

    python -m benchmarks.soak [--refreshes 200] [--cold 10] [--keep FOLDER]

One instance, the embedded model, a Hub in this process. Before each refresh the folder of feedback changes: new rows,
rows in an old file, duplicates, rows taken back, preferences turned round, broken rows, files renamed or put together,
and now and then a file that is unreadable or lost, whose gate must hold. Some come while a refresh is under way.
A line of JSON for each refresh, and one of all at the end; status 1 if anything was wrong.

Workers are forks of a process that has imported their libraries (`warm.py`), but for every `--cold`-th refresh, whose
workers are started as anywhere: the imports of 200 refreshes would take most of the time and show nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from benchmarks.soak.inbox import Inbox
from benchmarks.soak.location import NAME, pipeline
from benchmarks.soak.refreshing import CONFIG, by_daemon
from benchmarks.soak.rounds import REPO, Round, Soak, summary
from benchmarks.soak.warm import COLD, Warm, warm_workers
from dpo_assets.resources.artifacts import ArtifactStore
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import demo_recipe

FIRST_PAIRS = 120
RECIPE = "recipe.json"
PATIENCE = 600.0


def recipe(home: Path, **publishing: Any) -> dict[str, Any]:
    """The demo's recipe on the folder: every stage, with few and short answers. Its feedback is made of few words, so
    pairs that say nearly the same are kept; and that rows are lost holds a run, where by default it warns."""
    return demo_recipe(
        feedback={
            "sources": [{"path": str(home / "inbox" / "*.jsonl"), "format": "trl"}],
            "max_length": 96,
            "min_pairs": 10,
            "eval_fraction": 0.6,
            "cleaning": {"near_duplicates": "keep"},
        },
        sft={"epochs": 0.5, "batch_size": 16},
        dpo={"epochs": 0.5, "batch_size": 16},
        evaluation={"generations": 4, "max_new_tokens": 16, "sampled_answers": 4},
        checks={
            "probe_prompts": 2,
            "probe_tokens": 16,
            "sampled_answers": 4,
            "held_out_pairs": 16,
            "severity": {"feedback_volume": "error"},
        },
        retention={"keep_models": 3, "keep_days": 0, "keep_releases": 2},
        publishing=publishing,
    )


@contextmanager
def a_home(kept: Path | None) -> Iterator[Path]:
    """A folder with an inbox, a folder for temporary files and a dagster.yaml."""
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        home = kept or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        for name in ("inbox", "tmp"):
            (home / name).mkdir()
        (home / "dagster.yaml").write_text(CONFIG, encoding="utf-8")
        yield home


def surroundings(home: Path, warm: Warm, token: str = "") -> dict[str, str]:
    """The environment of daemon, code server and runs. The recipe must be written by then."""
    return os.environ | {
        "DAGSTER_HOME": str(home),
        "SOAK_RECIPE": str(home / RECIPE),
        "SOAK_PYTHON": warm.python,
        "TMPDIR": str(home / "tmp"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }


def soak(home: Path, refreshes: int, seed: int, cold: int) -> tuple[list[Round], Inbox]:
    """All rounds, each told as it ends."""
    inbox = Inbox(home / "inbox", random.Random(seed))
    inbox.begin(FIRST_PAIRS)
    told: list[Round] = []
    with HubServer() as hub, warm_workers(home) as warm, dg.DagsterInstance.from_config(str(home)) as instance:
        values = recipe(home, dry_run=False, repo_id=REPO, endpoint=hub.endpoint)
        (home / RECIPE).write_text(json.dumps(values), encoding="utf-8")
        component = pipeline(home / RECIPE, warm.python)
        tree = ArtifactStore().tree(instance, NAME)
        with by_daemon(home, surroundings(home, warm, hub.token), instance, PATIENCE) as refreshing:
            running = Soak(inbox, refreshing, instance, component.pipeline, tree, home, hub, warm.pid)
            for one in running.rounds(refreshes):
                told.append(one)
                print(json.dumps(asdict(one)), flush=True)
                if cold and (one.number + 1) % cold == 0:
                    (home / COLD).touch()
                else:
                    (home / COLD).unlink(missing_ok=True)
    return told, inbox


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--refreshes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cold", type=int, default=10, help="every so many refreshes with workers that import; 0: none"
    )
    parser.add_argument("--keep", type=Path, help="a folder that does not exist yet; default: a temporary one")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # So that what it started ends with it.
    with a_home(args.keep) as home:
        told, inbox = soak(home, args.refreshes, args.seed, args.cold)
    found = summary(told, inbox)
    print(json.dumps(found))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
