"""Stage `harness`: tasks of lm-evaluation-harness, answered by SFT and by the release, compared by document."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_assets.artifact import VOLATILE, write_json
from dpo_assets.checks.reports import HarnessScores, TaskScore
from dpo_assets.contract import SAMPLES, HarnessSpec, Progress, TasksSpec, memory_failure
from dpo_assets.errors import ConfigError
from dpo_assets.judging.documents import paired_scores, scored
from dpo_assets.training.models.chat_format import ChatFormat, load_chat_format
from dpo_assets.training.models.loading import autocast_of
from dpo_assets.training.policy import load_scored
from dpo_assets.training.reporting import Reporter

HASHES = ("doc_hash", "prompt_hash", "target_hash")  # What lm-eval 0.4.13 says a document was, beside its number.
Results = Mapping[str, Any]  # What `simple_evaluate` returns.


def run(spec: HarnessSpec, reporter: Reporter) -> None:
    """Writes `samples.json` (a row a document, metric and filter) and `report.json`.

    Raises:
        ConfigError: lm-eval is not installed, knows a task not, or cannot run one.
    """
    started, plan = time.perf_counter(), spec.plan.at_release()
    version = installed()
    chat = load_chat_format(spec.base_model, spec.template)
    found: list[Results] = []
    with contextlib.chdir(spec.include_path or Path.cwd()):
        manager = manager_of(spec)
        for number, (who, folder, adapter) in enumerate(spec.compared, start=1):
            model = load_scored(folder, plan, adapter)
            with autocast_of(plan):
                found.append(_evaluated(spec, model, chat, manager))
            del model
            gc.collect()
            reporter.log(Progress(stage="harness", done=number, total=2, note=f"{who} done").line())
    sft, policy = found
    rows = [row for task in sorted(policy["samples"]) for row in _paired(task, sft, policy)]
    HarnessScores(
        version=version,
        confidence=spec.confidence,
        scored=spec.plan.scored,
        tasks=tuple(score for task in sorted(policy["results"]) for score in _scores(task, sft, policy, rows, spec)),
    ).write(spec.output_dir)
    write_json(spec.output_dir / SAMPLES, rows)
    write_json(spec.output_dir / VOLATILE, {"seconds": time.perf_counter() - started})


def installed() -> str:
    """The version of lm-eval.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(
            f"evaluation.harness needs lm-evaluation-harness in the worker's environment: {error}. "
            "pip install 'dpo-assets[lm-eval]'"
        ) from None
    return str(lm_eval.__version__)


def manager_of(spec: HarnessSpec | TasksSpec) -> Any:
    """The tasks that lm-eval knows: those of the folder alone where they are all that is asked for.

    Raises:
        ConfigError: naming the tasks that there are not.
    """
    from lm_eval.tasks import TaskManager

    if spec.include_path is not None:
        own = TaskManager(include_path=str(spec.include_path), include_defaults=False)
        if set(spec.tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=str(spec.include_path) if spec.include_path else None)
    if unknown := sorted(set(spec.tasks) - set(manager.all_tasks)):
        where = spec.include_path or "no evaluation.harness.include_path"
        raise ConfigError(f"evaluation.harness: there is no task {', '.join(unknown)}, in {where} or in lm-eval")
    return manager


def _evaluated(spec: HarnessSpec, model: Any, chat: ChatFormat, manager: Any) -> Results:
    """The model's results, with what it said to each document.

    Raises:
        ConfigError: lm-eval fails, whatever the reason: a dataset that is not in the cache, a metric's package.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        lm = HFLM(
            pretrained=model,
            tokenizer=chat.tokenizer,
            backend="causal",
            batch_size=spec.batch_size,
            softmax_dtype="float32",
            chat_template_args=dict(spec.template.arguments),
        )
        results: Results | None = simple_evaluate(
            model=lm,
            tasks=list(spec.tasks),
            task_manager=manager,
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
            apply_chat_template=spec.apply_chat_template,
            bootstrap_iters=0,  # The intervals are of what is compared.
            log_samples=True,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
        )
    except Exception as error:
        if memory_failure(error) is not None:
            raise
        raise cannot_run(spec.tasks, error) from error
    assert results is not None, "the first process of one gets results"
    return results


def cannot_run(tasks: Sequence[str], error: Exception) -> ConfigError:
    """What lm-eval said, and the way out."""
    said = next(iter(str(error).splitlines()), "")
    return ConfigError(
        f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {said}. The worker has no network: "
        "the dataset of a task that comes with lm-eval must be in the Hub's cache (HF_HOME) before, which "
        "`lm_eval --tasks NAME --limit 1` puts there; for one of evaluation.harness.include_path run the same line "
        "with `--include_path` and read what it says."
    )


def _paired(task: str, sft: Results, policy: Results) -> Iterator[dict[str, Any]]:
    """What each document gave both sides, by metric and filter; None where a metric gives a document no number.

    Raises:
        ConfigError: the two were asked different documents, or the same ones otherwise.
    """
    before, after = ({_key(sample): sample for sample in side["samples"][task]} for side in (sft, policy))
    counts = {len(before), len(after), len(sft["samples"][task]), len(policy["samples"][task])}
    other = [key for key, sample in after.items() if key in before and _content(before[key]) != _content(sample)]
    if len(counts) > 1 or before.keys() != after.keys() or other:
        which = f" (document {other[0][0]} and {len(other) - 1} more)" if other else ""
        raise ConfigError(
            f"lm-eval asked SFT and policy different documents of {task}{which}: a task that draws its documents, "
            "prompts or targets anew for each model compares nothing; give it a fixed seed"
        )
    for (document, filter_), sample in after.items():
        for metric in sample["metrics"]:
            values = [scored(side[document, filter_].get(metric)) for side in (before, after)]
            yield {
                "task": task, "metric": metric, "filter": filter_, "document": document,
                **{name: sample[name] for name in HASHES}, "sft": values[0], "policy": values[1],
            }  # fmt: skip


def _key(sample: Mapping[str, Any]) -> tuple[int, str]:
    return int(sample["doc_id"]), str(sample.get("filter", "none"))


def _content(sample: Mapping[str, Any]) -> list[str]:
    return [str(sample[name]) for name in HASHES]


def _scores(
    task: str, sft: Results, policy: Results, rows: Sequence[Mapping[str, Any]], spec: HarnessSpec
) -> Iterator[TaskScore]:
    """One a metric and filter of lm-eval's results, of tasks and of groups of them. A group has no documents itself."""
    for name, value in sorted(policy["results"][task].items()):
        metric, _, filter_ = name.partition(",")
        if not filter_ or metric.endswith("_stderr"):
            continue
        own = [row for row in rows if (row["task"], row["metric"], row["filter"]) == (task, metric, filter_)]
        before, after = _aggregate(sft["results"][task].get(name)), _aggregate(value)
        found = paired_scores(
            [row["sft"] for row in own],
            [row["policy"] for row in own],
            [row["doc_hash"] for row in own],
            (before, after),
            spec.confidence,
        )
        yield TaskScore(
            task=task,
            metric=metric,
            filter=filter_,
            higher_is_better=policy["higher_is_better"].get(task, {}).get(metric),
            documents=int(policy["results"][task]["sample_len"]),
            asked=_digest(own) if own else "",
            sft=before,
            policy=after,
            comparison=found.comparison,
            difference=found.difference,
            perplexity=found.perplexity,
        )


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of what was asked, in no order: 64 hex digits."""
    content = sorted([str(row[name]) for name in HASHES] for row in rows)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _aggregate(value: Any) -> float:
    """What lm-eval says of all documents; NaN where that is no number."""
    number = scored(value)
    return number if isinstance(number, float) else math.nan
