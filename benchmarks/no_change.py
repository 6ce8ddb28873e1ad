"""What a refresh costs in which nothing changed: a small pipeline is run once, and then again as it is.

    python -m benchmarks.no_change [--repeats 3]

A line for each executor: wall and CPU seconds of the run's process and its children, from start to end, as
`dagster job execute` starts it. The first run, which trains, is told apart. Seconds of a machine that does other work
besides say little; CPU seconds say more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpo_assets.demo.run import INSTANCE_CONFIG
from dpo_assets_tests.pipelines import short_recipe

LOCATION = """\
import json
from dpo_assets import build_dpo_defs
defs = build_dpo_defs("small", json.load(open({recipe!r})))
"""
NAME = "small"


def timed_run(home: Path, location: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of one refresh.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "dagster", "job", "execute", "-f", str(location), "-j", f"{NAME}_refresh"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        command, env=os.environ | {"DAGSTER_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"the refresh failed:\n{done.stderr[-4000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="no-change-") as scratch:
        home = Path(scratch)
        (home / "dagster.yaml").write_text(INSTANCE_CONFIG, encoding="utf-8")
        first = 0.0
        for executor in ("in_process", "location"):
            recipe, location = home / f"{executor}.json", home / f"{executor}.py"
            recipe.write_text(json.dumps(short_recipe(refresh={"executor": executor})), encoding="utf-8")
            location.write_text(LOCATION.format(recipe=str(recipe)), encoding="utf-8")
            if not first:
                first, _ = timed_run(home, location)
            runs = [timed_run(home, location) for _ in range(repeats)]
            said = {
                "executor": executor,
                "first_run_seconds": round(first, 1),
                "no_change_seconds": [round(wall, 1) for wall, _ in runs],
                "median_seconds": round(statistics.median(wall for wall, _ in runs), 1),
                "median_cpu_seconds": round(statistics.median(cpu for _, cpu in runs), 1),
                "load": round(os.getloadavg()[0], 1),
            }
            print(json.dumps(said))


if __name__ == "__main__":
    main()
