"""Small real pipelines for tests: the embedded model, real preferences, few of them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from filelock import FileLock

from dpo_assets import build_dpo_defs

PACKAGE = Path(str(files("dpo_assets")))
OASST = PACKAGE / "data" / "oasst" / "oasst_en_100_tree.jsonl"
STORIES = PACKAGE / "data" / "stories260k"
DATA = ("base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset")


def demo_recipe(**changes: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's recipe as plain values, with sections changed."""
    text = (PACKAGE / "defs" / "demo" / "defs.yaml").read_text(encoding="utf-8")
    recipe: dict[str, Any] = yaml.safe_load(text)["attributes"]
    del recipe["name"]
    for section, values in changes.items():
        recipe[section] = {**recipe.get(section, {}), **copy.deepcopy(dict(values))}
    return recipe


def short_recipe(**changes: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's recipe on its short pairs alone: the same stages, with a fraction of the tokens."""
    return demo_recipe(feedback={"max_length": 96, "max_quarantine_rate": 1.0, "min_pairs": 10}, **changes)


def trl_feedback(path: Path, pairs: int = 80) -> Path:
    """A feedback file in TRL's explicit shape, one pair a prompt."""
    rows = [
        {"prompt": f"Tell me about the number {n}.", "chosen": f"The number {n} is a happy one.", "rejected": "No."}
        for n in range(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trl_recipe(path: Path, **feedback: Any) -> dict[str, Any]:
    """The demo's recipe on a TRL file, whose pairs are mostly trained on: the demo itself holds most of its own out."""
    sources = [{"path": str(path), "format": "trl"}]
    return demo_recipe(feedback={"sources": sources, "eval_fraction": 0.4, **feedback})


def materialize(
    recipe: Mapping[str, Any],
    instance: dg.DagsterInstance,
    assets: Sequence[str],
    *,
    name: str = "demo",
    run_config: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    op_retry_policy: dg.RetryPolicy | None = None,
) -> dg.ExecuteInProcessResult:
    """Materialises some assets of a pipeline in this process; their workers are real processes."""
    defs = build_dpo_defs(name, recipe, resources=resources)
    selection = dg.AssetSelection.assets(*([name, asset] for asset in assets))
    job = dg.define_asset_job("test_job", selection=selection, op_retry_policy=op_retry_policy)
    resolved = dg.Definitions.merge(defs, dg.Definitions(jobs=[job])).resolve_job_def("test_job")
    return resolved.execute_in_process(instance=instance, run_config=run_config, raise_on_error=False)


@contextmanager
def instance_after(
    recipe: Mapping[str, Any], assets: Sequence[str], homes: Path, target: Path
) -> Iterator[dg.DagsterInstance]:
    """An instance of its own, in `target`, in which these assets of a pipeline `demo` stand.

    The first who asks makes them, once for all processes of a test session, which share `homes`; everyone gets a copy.
    """
    identity = json.dumps([recipe, list(assets)], sort_keys=True, default=str)
    home = homes / hashlib.sha256(identity.encode()).hexdigest()[:16]
    with FileLock(f"{home}.lock"):
        if not home.exists():
            unfinished = home.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # Of somebody who failed.
            unfinished.mkdir()
            with dg.DagsterInstance.local_temp(str(unfinished)) as instance:
                made = materialize(recipe, instance, assets)
                assert made.success, failures(made)
            unfinished.rename(home)
    shutil.copytree(home, target)
    with dg.DagsterInstance.local_temp(str(target)) as instance:
        yield instance


def failures(result: dg.ExecuteInProcessResult) -> list[str]:
    """What the failed steps said."""
    said = []
    for event in result.all_events:
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            data = event.step_failure_data
            described = data.user_failure_data.description if data.user_failure_data else None
            said.append(described or str(data.error))
    return said


def failed_checks(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    """Check name -> metadata values, of every check that did not pass."""
    return {
        check.check_name: {k: v.value for k, v in check.metadata.items()}
        for check in result.get_asset_check_evaluations()
        if not check.passed
    }


def metadata(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    """Metadata values of an asset's materialisation in a run."""
    for event in result.get_asset_materialization_events():
        materialisation = event.step_materialization_data.materialization
        if materialisation.asset_key.path[-1] == asset:
            return {k: v.value for k, v in materialisation.metadata.items()}
    raise AssertionError(f"{asset} was not materialised")
