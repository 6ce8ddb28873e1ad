"""CPU time of loading this package's code location, against an empty `Definitions`.

    python benchmarks/location_load.py [--repeats 7]

Each sample is a fresh interpreter that loads a code location the way Dagster's code server does; the two cases are
interleaved. Prints a row for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

LIMIT = 1.15
EMPTY = "import dagster as dg\n\ndefs = dg.Definitions()\n"


def load_seconds(arguments: list[str], folder: Path) -> float:
    """CPU seconds (user + system) of `dagster definitions validate` on a location."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", *arguments],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "empty_location.py"
        empty.write_text(EMPTY, encoding="utf-8")
        cases = {
            "empty Definitions": (["-f", str(empty)], Path(scratch)),
            "dpo_assets (2 pipelines)": (["-w", "workspace.yaml"], root),
        }
        for arguments, folder in cases.values():  # warm the file cache
            load_seconds(arguments, folder)
        samples: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, (arguments, folder) in cases.items():
                samples[name].append(load_seconds(arguments, folder))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    base, ours = medians.values()
    print(f"{date.today()}, Python {platform.python_version()}, dagster {version('dagster')}, {repeats} repeats")
    print("| case | CPU s, median | min | max | ratio |\n|---|---|---|---|---|")
    for name, values in samples.items():
        print(f"| {name} | {medians[name]:.2f} | {min(values):.2f} | {max(values):.2f} | {medians[name] / base:.3f} |")
    return 0 if ours / base <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
