"""The whole pipeline through Dagster, from raw feedback to the dry-run release, on this machine's device.

    python benchmarks/gpu_pipeline.py --model MODEL_FOLDER --out cpu.json                  # the demo's assistant
    python benchmarks/gpu_pipeline.py --model MODEL_FOLDER --out gpu.json --against cpu.json
    python benchmarks/gpu_pipeline.py --model MODEL_FOLDER --recipes chat,classic --out gpu.json --against cpu.json

MODEL_FOLDER is SmolLM2-135M-Instruct, as `make demo-chat` writes it. `chat` is the recipe of the demo, `classic` that
of examples/classic_unsloth.yaml on the same pairs, written to a file of prompts and two answers; without a GPU it runs
on the packed trainer in what the planner chooses, for TRL and Unsloth need one. Each runs as a job of a fresh instance,
in a process that is ended when its time is over. Printed are what was decided of which device, the plan's memory beside
the allocator's peak of every stage, seconds of every asset, and every check; with --against, which verdicts differ.
What a run itself prints is copied beside --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PEAKS, PROBE = "DPO_ASSETS_PEAKS", ROOT / "benchmarks" / "peaks"
PACKAGES = ("dagster", "torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth")
# What the demo adds to a recipe for a dataset of a hundred pairs.
SMALL = {"min_pairs": 50, "generations": 6, "max_new_tokens": 64}
INTERVALS = ("implicit_reward_accuracy", "logp_accuracy_policy", "logp_accuracy_sft", "pick_the_longer")
LOCATION = """\
import json
from pathlib import Path
from dpo_assets.component import build_dpo_defs
from dpo_assets.resources.launcher import LocalLauncher

recipe = json.loads(Path({recipe!r}).read_text())
defs = build_dpo_defs({name!r}, recipe, resources={{"launcher": LocalLauncher(environment=[{peaks!r}])}})
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--recipes", default="chat")
    parser.add_argument("--out", type=Path, default=Path("pipeline.json"))
    parser.add_argument("--against", type=Path, help="what another machine's run wrote: which verdicts differ?")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds of one recipe")
    parser.add_argument("--home", type=Path, help="folder of the instances; default: a new one")
    parser.add_argument("--report", action="store_true", help="print what --out holds, and run nothing")
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    if not args.report:
        home = (args.home or Path(tempfile.mkdtemp(prefix="dpo-pipeline-"))).absolute()
        for name in args.recipes.split(","):
            found[name] = run(name, args.model.absolute(), home / name, args.timeout)
            shutil.copyfile(home / name / "output.log", args.out.with_suffix(f".{name}.log"))
            args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    other = json.loads(args.against.read_text(encoding="utf-8")) if args.against else {}
    for name, facts in found.items():
        print(report(name, facts))
        if name in other and "checks" in facts:
            print(compared(facts, other[name]))
    return 0 if all(facts.get("status") == "SUCCESS" for facts in found.values()) else 1


def run(name: str, model: Path, home: Path, timeout: float) -> dict[str, Any]:
    """One recipe as a job of an instance of its own, and what its event log and artefacts say."""
    home.mkdir(parents=True)
    gpu = device()
    facts: dict[str, Any] = {"date": str(date.today()), "device": gpu, "versions": versions()}
    try:
        recipe = {"chat": chat, "classic": classic}[name](model, home, gpu["kind"] == "cuda")
    except KeyError:
        raise SystemExit(f"no recipe {name}; there are chat and classic") from None
    begun = time.monotonic()
    error = execute(name, recipe, home, timeout)
    facts |= {"seconds": round(time.monotonic() - begun, 1), "recipe": recipe}
    if error:
        facts["error"] = error
    return facts | told(home, name)


def chat(model: Path, home: Path, gpu: bool) -> dict[str, Any]:
    """The demo's recipe, with its base at `model`."""
    import yaml

    declared = ROOT / "dpo_assets" / "defs" / "chat" / "defs.yaml"
    recipe: dict[str, Any] = yaml.safe_load(declared.read_text(encoding="utf-8"))["attributes"]
    recipe.pop("name")
    return recipe | {"base_model": {"source": str(model)}}


def classic(model: Path, home: Path, gpu: bool) -> dict[str, Any]:
    """The example's recipe, with its base at `model` and the package's pairs in its format."""
    import yaml

    declared = ROOT / "examples" / "classic_unsloth.yaml"
    recipe: dict[str, Any] = yaml.safe_load(declared.read_text(encoding="utf-8"))["attributes"]
    recipe.pop("name")
    feedback = recipe["feedback"] | {"eval_fraction": 0.35, "sources": [{"path": str(pairs(home)), "format": "trl"}]}
    recipe |= {"base_model": {"source": str(model)}, "feedback": feedback, "evaluation": SMALL}
    if not gpu:
        recipe["dpo"] = recipe["dpo"] | {"trainer": "packed"}
        recipe["hardware"] = {"threads": 2}
    return recipe


def pairs(home: Path) -> Path:
    """The package's OpenAssistant pairs as JSON lines of prompt, chosen and rejected messages."""
    from dpo_assets.feedback.ingest import read_file
    from dpo_assets.feedback.readers import ReadOptions
    from dpo_assets.feedback.sources import files_of
    from dpo_assets.recipe import FeedbackSource

    options = ReadOptions(pairing="best_worst", include_synthetic=False)
    read = [read_file(file, options) for file in files_of([FeedbackSource(path="builtin:oasst", format="oasst_tree")])]
    path = home / "feedback.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for pair in (pair for batch in read for pair in batch.pairs):
            row = {
                key: [{"role": message["role"], "content": message["content"]} for message in messages]
                for key, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected))
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def device() -> dict[str, Any]:
    """What the pipeline's own resource sees of this machine."""
    from dpo_assets.resources.gpu import GpuResource

    return asdict(GpuResource().detect())


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def execute(name: str, recipe: dict[str, Any], home: Path, timeout: float) -> str:
    """Runs the job to its end in a process group of its own; what went wrong, with the end of its output."""
    from dpo_assets.demo.run import INSTANCE_CONFIG

    (home / "dagster.yaml").write_text(INSTANCE_CONFIG, encoding="utf-8")
    (home / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    location = home / "location.py"
    values = {"recipe": str(home / "recipe.json"), "name": name, "peaks": PEAKS}
    location.write_text(LOCATION.format(**values), encoding="utf-8")
    paths = [str(PROBE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "DAGSTER_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        PEAKS: str(home / "peaks.jsonl"),
    }
    command = [sys.executable, "-m", "dagster", "job", "execute", "-f", str(location), "-j", f"{name}_refresh"]
    output = home / "output.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=home,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            # The worker ends with the process that started it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"not done within {timeout:.0f} s\n{_tail(output)}"
    return f"exit status {status}\n{_tail(output)}" if status else ""


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-60:])


def told(home: Path, name: str) -> dict[str, Any]:
    """What the last run of an instance left: status, seconds of each asset, every check, plan, scores and peaks."""
    import dagster as dg

    from dpo_assets.demo.summary import summarise

    os.environ["DAGSTER_HOME"] = str(home)
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs(limit=1)
        if not runs:
            return {"status": "NOT STARTED"}
        run_id = runs[0].run_id
        summary = summarise(instance, run_id)
        facts: dict[str, Any] = {"status": summary.status, "problems": summary.problems, "errors": summary.errors}
        facts["asset_seconds"] = {
            step.step_key.removeprefix(f"{name}__"): round(step.end_time - step.start_time, 2)
            for step in instance.get_run_step_stats(run_id)
            if step.start_time and step.end_time
        }
        facts["checks"] = checks(instance, run_id)
        facts["plan"] = artefact(instance, run_id, "dpo_plan", "plan.json")
        facts["dpo"] = artefact(instance, run_id, "dpo_adapter", "report.json")
    scores = None if summary.scores is None else summary.scores.model_dump(mode="json")
    facts |= {"scores": scores, "verdict": summary.verdict, "pairs": summary.pairs, "release": summary.release}
    facts["answers"] = [{key: row[key] for key in ("sft", "policy")} for row in summary.answers]
    facts["peaks"] = peaks(home / "peaks.jsonl")
    facts["release_files"] = released(summary.release)
    return facts


def checks(instance: Any, run_id: str) -> list[dict[str, Any]]:
    """Every evaluated check of a run."""
    import dagster as dg

    found = []
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        evaluation = entry.dagster_event.asset_check_evaluation_data
        value = evaluation.metadata.get("value")
        found.append(
            {
                "asset": evaluation.asset_key.path[-1],
                "check": evaluation.check_name,
                "passed": evaluation.passed,
                "severity": evaluation.severity.value,
                "value": None if value is None else str(value.value),
            }
        )
    return found


def artefact(instance: Any, run_id: str, asset: str, file: str) -> dict[str, Any]:
    """A JSON file of the artefact that a run materialised; empty where it did not come to that."""
    import dagster as dg

    from dpo_assets.assets.step import PATH

    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
        made = entry.dagster_event.step_materialization_data.materialization
        if made.asset_key.path[-1] == asset:
            path = Path(str(made.metadata[PATH].value)) / file
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    return {}


def peaks(path: Path) -> dict[str, dict[str, float]]:
    """Stage -> allocator's peaks, of the processes that used a GPU."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        row["arguments"][0]: {k: v for k, v in row.items() if k != "arguments"}
        for row in rows
        if row["arguments"] and row["peak_allocated_gib"]  # Libraries start helpers of their own.
    }


def released(folder: str) -> dict[str, int]:
    """Files of the dry-run release and their sizes."""
    path = Path(folder)
    return (
        {str(f.relative_to(path)): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()} if folder else {}
    )


def report(name: str, facts: dict[str, Any]) -> str:
    """Markdown."""
    gpu, plan = facts["device"], facts.get("plan") or {}
    lines = [f"## {name}: {facts.get('status')} in {facts['seconds']:.0f} s ({facts['date']})", ""]
    lines.append(f"device: {json.dumps(gpu)}; {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}")
    if facts.get("error"):
        lines += ["", "```", facts["error"], "```"]
    lines += [f"- {error}" for error in [*facts.get("problems", []), *facts.get("errors", [])]]
    if plan:
        keys = ("device", "precision", "precision_reason", "kernels", "token_budget", "recomputed_layers", "memory_gib")
        lines.append("plan: " + ", ".join(f"{key} {plan[key]}" for key in (*keys, "memory_available_gib")))
    if facts.get("peaks"):
        lines += ["", "| stage | peak GiB, allocated / reserved | plan's estimate |", "|---|---|---|"]
        for stage, peak in facts["peaks"].items():
            off = f"{plan['memory_gib']:.2f} ({plan['memory_gib'] / peak['peak_allocated_gib'] - 1:+.0%})"
            shown = f"{peak['peak_allocated_gib']:.2f} / {peak['peak_reserved_gib']:.2f}"
            lines.append(f"| {stage} | {shown} | {off if stage in ('sft', 'dpo') else ''} |")
    if facts.get("asset_seconds"):
        lines += ["", "| asset | s |", "|---|---|"]
        lines += [f"| {asset} | {seconds:.1f} |" for asset, seconds in facts["asset_seconds"].items()]
    if dpo := facts.get("dpo"):
        said = ("kernels", "steps", "first_loss", "expected_first_loss", "last_loss")
        lines += ["", "DPO: " + ", ".join(f"{key} {dpo[key]}" for key in said if key in dpo)]
    if scores := facts.get("scores"):
        lines += [f"{key}: {_interval(scores[key])}" for key in INTERVALS if key in scores]
    if verdict := facts.get("verdict"):
        lines.append(f"verdict: {verdict['decision']}: {verdict['reason']}")
    lines.append(f"release: {len(facts.get('release_files', {}))} files")
    found = facts.get("checks", [])
    lines.append(f"checks: {len(found)}, of which {sum(not check['passed'] for check in found)} did not pass")
    lines += [f"- {_said(check)}" for check in found if not check["passed"]]
    return "\n".join(lines)


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Which verdicts differ between two machines, and whether their accuracies' intervals overlap."""
    mine = {(check["asset"], check["check"]): check for check in ours["checks"]}
    other = {(check["asset"], check["check"]): check for check in theirs["checks"]}
    lines = ["", f"against {theirs['device']['name']} ({theirs['date']}):"]
    same = [key for key in mine.keys() & other.keys() if mine[key]["passed"] == other[key]["passed"]]
    lines.append(f"{len(same)} of {len(mine.keys() | other.keys())} verdicts are the same")
    for key in sorted(mine.keys() | other.keys()):
        if key not in same:
            told = [_said(side[key]) if key in side else "not evaluated" for side in (mine, other)]
            lines.append(f"- {key[0]} {key[1]}: here {told[0]}; there {told[1]}")
    lines.append(f"decision: here {ours['verdict'].get('decision')}, there {theirs['verdict'].get('decision')}")
    for score in (score for score in INTERVALS if score in ours["scores"] and score in theirs["scores"]):
        a, b = ours["scores"][score], theirs["scores"][score]
        overlap = "overlap" if max(a["low"], b["low"]) <= min(a["high"], b["high"]) else "DO NOT OVERLAP"
        lines.append(f"{score}: here {_interval(a)}, there {_interval(b)}: {overlap}")
    return "\n".join(lines)


def _said(check: dict[str, Any]) -> str:
    outcome = "passed" if check["passed"] else check["severity"]
    return f"{check['asset']} {check['check']} {outcome}: {check['value']}"


def _interval(score: dict[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] (n={score['n']})"


if __name__ == "__main__":
    sys.exit(main())
