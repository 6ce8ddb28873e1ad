"""Which faults the tests see: mutants of the modules that decide something, by mutmut, and how many survive.

    pip install mutmut
    python -m benchmarks.mutation --sample 40 --out survivors.jsonl

The tracked files are copied, mutmut writes every mutant of MUTATED, and of each module a sample is drawn (by a fixed
seed) and run against TESTS. A mutant that only changes the wording of a message is not drawn: few tests hold what a
message says, and few should. Prints a table, and writes the survivors with their change.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATED = (
    "dpo_assets/checks/*", "dpo_assets/publishing/*", "dpo_assets/training/trainers/losses.py",
    "dpo_assets/training/batches/packing.py",
    "dpo_assets/training/scoring/cache.py", "dpo_assets/training/trainers/reference.py",
    "dpo_assets/feedback/screening.py", "dpo_assets/feedback/pairing.py",
)  # fmt: skip
TESTS = (
    "dpo_assets_tests/checks", "dpo_assets_tests/test_collapse_cases.py", "dpo_assets_tests/publishing",
    "dpo_assets_tests/test_docs.py",
)  # fmt: skip
# Modules whose tests run torch or polars, which have threads of their own: a forked process hangs. Each mutant gets a
# fresh process, with the tests that are about its module.
FRESH: dict[str, tuple[str, ...]] = {
    "dpo_assets/training/trainers/losses.py": ("dpo_assets_tests/training/test_losses.py",),
    "dpo_assets/training/batches/packing.py": ("dpo_assets_tests/training/test_packing.py",),
    "dpo_assets/training/scoring/cache.py": ("dpo_assets_tests/training/test_reference.py",),
    "dpo_assets/training/trainers/reference.py": ("dpo_assets_tests/training/test_reference.py",),
    "dpo_assets/feedback/screening.py": (
        "dpo_assets_tests/feedback/test_screening.py", "dpo_assets_tests/feedback/test_screened_pairs.py",
    ),
    "dpo_assets/feedback/pairing.py": ("dpo_assets_tests/feedback/test_pairing.py",),
}  # fmt: skip
# Whole pipelines take minutes a mutant; other tests of the suite run them.
LEFT_OUT = ("dpo_assets_tests/checks/test_severity.py", "pipeline", "stop_a_run", "shows_its_plots")
SURVIVED, NO_TESTS = 0, (5, 33)  # Exit codes that mutmut keeps of a mutant's tests.
SEED = 20261127


@dataclass(frozen=True)
class Mutant:
    """A change of one function. `name` is mutmut's."""

    name: str
    module: str
    change: str


def copied(folder: Path) -> Path:
    """The tracked files in `folder`, with mutmut's settings."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    others = sorted(p.name for p in folder.iterdir() if p.name not in ("dpo_assets", "pyproject.toml", "setup.cfg"))
    file, *words = LEFT_OUT
    settings = {
        "source_paths": ["dpo_assets"],
        "only_mutate": list(MUTATED),
        "also_copy": others,
        "pytest_add_cli_args_test_selection": list(TESTS),
        "pytest_add_cli_args": [f"--ignore={file}", "-k", f"not ({' or '.join(words)})", "-p", "no:cacheprovider"],
        "use_git_change_detection": False,
        "process_isolation": "forkserver",
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as handle:
        handle.write("\n[tool.mutmut]\n" + "\n".join(lines) + "\n")
    return folder


def mutmut(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Hypothesis keeps no deadline in CI, where a machine under load would fail tests that no mutant broke.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CI": "1"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")


def exit_code(folder: Path, mutant: Mutant) -> int:
    """Of the module's tests, in a process of their own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MUTANT_UNDER_TEST": mutant.name, "CI": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "mutants"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FRESH[mutant.module]]
    try:
        done = subprocess.run(command, cwd=folder / "mutants", env=environment, capture_output=True, timeout=600)
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode


def mutants_of(folder: Path) -> Iterator[Mutant]:
    """Every mutant that changes more than the wording of a text."""
    for path in sorted((folder / "mutants").rglob("*.py.meta")):
        source = path.with_suffix("")
        tree = ast.parse(source.read_text(encoding="utf-8"))
        bodies = {n.name: ast.Module(n.body, []) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        for name in json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]:
            own = name.rsplit(".", 1)[-1]
            first, changed = bodies[re.sub(r"__mutmut_\d+$", "__mutmut_orig", own)], bodies[own]
            if _without_words(first) == _without_words(changed):
                continue
            before, after = (ast.unparse(body).splitlines() for body in (first, changed))
            lines = [d for d in difflib.unified_diff(before, after, lineterm="", n=0) if d[0] in "+-"][2:]
            yield Mutant(name, source.relative_to(folder / "mutants").as_posix(), "\n".join(lines))


def _without_words(body: ast.Module) -> str:
    """A function's form, with every text of it the same."""
    text = r"Constant\(value=(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|None)\)"
    return re.sub(text, "Text", ast.dump(body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=40, help="mutants of a module")
    parser.add_argument("--only", default="", help="modules whose path holds one of these texts, between commas")
    parser.add_argument("--children", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("survivors.jsonl"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folder = copied(Path(scratch))
        mutmut(folder, "run", "no.such.mutant")  # Writes the mutants, and ends where it finds none of that name.
        by_module: dict[str, list[Mutant]] = {}
        for mutant in mutants_of(folder):
            if any(part in mutant.module for part in given.only.split(",")):
                by_module.setdefault(mutant.module, []).append(mutant)
        draw = random.Random(SEED)
        sample = {m: draw.sample(all_, min(given.sample, len(all_))) for m, all_ in sorted(by_module.items())}
        codes: dict[str, int | None] = {}
        if names := [mutant.name for module, drawn in sample.items() if module not in FRESH for mutant in drawn]:
            done = mutmut(folder, "run", "--max-children", str(given.children), *names)
            for meta in (folder / "mutants").rglob("*.py.meta"):
                codes |= json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
            if not any(codes[name] is not None for name in names):
                sys.exit(f"mutmut ran no mutant:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        with ThreadPoolExecutor(given.children) as pool:
            fresh = [mutant for module, drawn in sample.items() if module in FRESH for mutant in drawn]
            codes |= dict(zip((m.name for m in fresh), pool.map(partial(exit_code, folder), fresh), strict=True))
        with given.out.open("w", encoding="utf-8") as out:
            print("| module | mutants | drawn | killed | survived | no test |\n|---|---|---|---|---|---|")
            for module, drawn in sample.items():
                alive = [m for m in drawn if codes[m.name] == SURVIVED]
                untested = [m for m in drawn if codes[m.name] in NO_TESTS]
                killed = sum(codes[m.name] is not None for m in drawn) - len(alive) - len(untested)
                counts = (len(by_module[module]), len(drawn), killed, len(alive), len(untested))
                print(f"| {module} | {' | '.join(map(str, counts))} |")
                for kind, found in (("survived", alive), ("no test", untested)):
                    for m in found:
                        row = {"module": module, "mutant": m.name, "kind": kind, "change": m.change}
                        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
