"""A stage that runs out of memory goes on in a fresh process with smaller forwards, and gives up with what to change.

The worker is real and so is the shortage: it runs under RLIMIT_AS, and the kernel refuses what PyTorch's allocator asks
for. The one thing put in is the size of a model: the embedded one has 260 thousand parameters, so each forward also
reserves what a large model would keep, TOKEN_BYTES a token. A GPU's allocator cannot be had here; that its errors are
told from others is tested on their texts.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dpo_assets.assets.out_of_memory as retries
from dpo_assets import LocalLauncher
from dpo_assets.artifact import VOLATILE, fingerprint, open_artifact
from dpo_assets.assets.dpo_plan import PLAN
from dpo_assets.contract import EvaluateSpec, Failure, MergeSpec, TokenizeSpec, TrainSpec, memory_failure
from dpo_assets_tests.pipelines import DATA, failures, instance_after, materialize, metadata, short_recipe
from dpo_assets_tests.samples import plan

TOKEN_BYTES = 8 * 2**20  # A token of a forward of an 8B model keeps about as much.
SLACK_TOKENS = 128  # What the process itself grows by while it trains.
# Address space is reserved, never written, so the test needs none of this memory itself.
WORKER = """#!{python}
import os, resource, runpy, sys
import torch

def address_space():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()

def reserve(module, args):
    if isinstance(module, torch.nn.Embedding):
        tokens = args[0].numel()
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            limit = address_space() + {tokens} * {token_bytes}
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        torch.empty(tokens * {token_bytes}, dtype=torch.uint8)

with open({starts!r}, "a") as starts:
    starts.write(f"{{sys.argv[3]}} {{os.getpid()}}\\n")
torch.nn.modules.module.register_module_forward_pre_hook(reserve)
del sys.argv[1:3]  # `-m dpo_assets.training`
runpy.run_module("dpo_assets.training", run_name="__main__", alter_sys=True)
"""


class Scarce:
    """A launcher whose workers have room for forwards of so many tokens, and the list of those it started."""

    def __init__(self, folder: Path, tokens: int) -> None:
        folder.mkdir()
        self._starts = folder / "starts"
        script = folder / "python"
        script.write_text(
            WORKER.format(python=sys.executable, tokens=tokens, token_bytes=TOKEN_BYTES, starts=str(self._starts))
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self.resources = {"launcher": LocalLauncher(python=str(script))}

    @property
    def stages(self) -> list[str]:
        """Stage of each worker process, in the order of their starts."""
        return [line.split()[0] for line in self._starts.read_text().splitlines()]

    @property
    def processes(self) -> set[str]:
        return {line.split()[1] for line in self._starts.read_text().splitlines()}


def recipe() -> dict[str, Any]:
    """Short pairs and large steps, so that a step's tokens are several times the longest pair's."""
    return short_recipe(sft={"epochs": 0.5, "batch_size": 32}, dpo={"epochs": 0.5, "batch_size": 32})


@pytest.fixture
def instance(homes: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """A real instance, in which the data stands that both stages train on."""
    with instance_after(short_recipe(), DATA, homes, tmp_path / "dagster_home") as opened:
        yield opened


def warnings_of(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> list[str]:
    return [e.user_message for e in instance.all_logs(result.run_id) if "ran out of memory" in e.user_message]


def plan_of(instance: dg.DagsterInstance) -> dict[str, Any]:
    folder = Path(instance.storage_directory()) / "dpo_assets" / "demo" / "dpo_plan"
    (made,) = [p for p in folder.iterdir() if p.is_dir()]
    found: dict[str, Any] = json.loads((made / PLAN).read_text())
    return found


def made(instance: dg.DagsterInstance, node: str) -> list[Path]:
    folder = Path(instance.storage_directory()) / "dpo_assets" / "demo" / node
    return [p for p in folder.iterdir() if p.is_dir()]


def test_a_stage_goes_on_with_smaller_forwards_and_the_same_steps(
    instance: dg.DagsterInstance, homes: Path, tmp_path: Path
) -> None:
    assert materialize(recipe(), instance, ["dpo_plan"]).success
    planned = plan_of(instance)
    budget = planned["token_budget"]
    assert budget // 4 >= planned["longest_pair"], "the dataset leaves no room for two halvings"
    for asset, stage, halvings in (("sft_checkpoint", "sft", 2), ("dpo_adapter", "dpo", 1)):
        scarce = Scarce(tmp_path / stage, tokens=(budget >> halvings) + SLACK_TOKENS)
        result = materialize(recipe(), instance, [asset], resources=scarce.resources)
        assert result.success, failures(result)
        said = metadata(result, asset)
        # How many it takes is up to how full the forwards are; these fit in any case.
        retries = said["out_of_memory_retries"]
        assert 1 <= retries <= halvings
        assert said["token_budget_used"] == budget >> retries
        assert said["steps"] == planned[f"{stage}_steps"]
        (artefact,) = map(open_artifact, made(instance, asset))
        assert artefact.json(VOLATILE)["token_budget_used"] == said["token_budget_used"]
        assert scarce.stages == [stage] * (1 + retries)
        assert len(scarce.processes) == 1 + retries, "a retry must be a fresh process"
        warnings = warnings_of(instance, result)
        assert len(warnings) == retries
        assert f"`{stage}` ran out of memory in forwards of {budget} tokens" in warnings[0]
        assert f"with {budget // 2} (retry 1 of 3); pairs per optimizer step stay the same" in warnings[0]
        assert "can't allocate memory" in warnings[0]

    # The same gradients, and the same artefact: a run with enough memory finds it and trains nothing.
    ample = materialize(recipe(), instance, ["sft_checkpoint", "dpo_adapter"])
    assert all(str(metadata(ample, asset)["reused"]).startswith("yes") for asset in ("sft_checkpoint", "dpo_adapter"))
    assert metadata(ample, "dpo_adapter")["out_of_memory_retries"] >= 1
    with instance_after(short_recipe(), DATA, homes, tmp_path / "with_room") as with_room:
        assert materialize(recipe(), with_room, ["dpo_plan", "sft_checkpoint"]).success
        (whole,), (parts,) = made(with_room, "sft_checkpoint"), made(instance, "sft_checkpoint")
    assert whole.name == parts.name
    after = [open_artifact(p).json("report.json")["held_out_nll_after"] for p in (whole, parts)]
    assert after[0] == pytest.approx(after[1], abs=1e-5)


def test_after_the_last_halving_the_run_says_what_to_change(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert materialize(recipe(), instance, ["dpo_plan"]).success
    scarce = Scarce(tmp_path / "scarce", tokens=1)
    assert retries.MAX_HALVINGS == 3
    monkeypatch.setattr(retries, "MAX_HALVINGS", 1)
    result = materialize(recipe(), instance, ["sft_checkpoint"], resources=scarce.resources)
    assert not result.success
    assert scarce.stages == ["sft", "sft"]
    (said,) = failures(result)
    assert "ran out of memory in forwards of" in said
    assert "after 1 retry with smaller ones" in said
    assert "lower feedback.max_length or lora.rank, or take a smaller base" in said
    assert "4bit" not in said, "a CPU has no 4-bit weights"
    assert made(instance, "sft_checkpoint") == []


def test_forwards_never_get_smaller_than_the_longest_pair(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    small = recipe() | {
        "dpo": {
            "batch_size": 2,
            "epochs": 0.05,
            "learning_rate": 5e-5,
        },
        "sft": {"strategy": "adopt"},
    }
    assert materialize(small, instance, ["dpo_plan", "sft_checkpoint"]).success
    planned = plan_of(instance)
    assert planned["token_budget"] < 4 * planned["longest_pair"]
    scarce = Scarce(tmp_path / "scarce", tokens=1)
    result = materialize(small, instance, ["dpo_adapter"], resources=scarce.resources)
    (said,) = failures(result)
    assert f"in forwards of {planned['longest_pair']} tokens" in said
    assert "the longest pair alone takes that many" in said
    assert 1 <= len(scarce.stages) <= 3
    assert all(
        f"with {n} (" not in text for text in warnings_of(instance, result) for n in range(planned["longest_pair"])
    )


# Which errors mean that memory ran out


def oom_texts() -> list[BaseException]:
    import torch

    cuda = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB"
    return [
        torch.cuda.OutOfMemoryError(cuda),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        MemoryError(),
        MemoryError("Unable to allocate 9.31 GiB for an array"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_every_allocators_way_to_say_it_is_understood(number: int) -> None:
    error = oom_texts()[number]
    failure = memory_failure(error)
    assert failure is not None
    assert failure.kind == "memory"
    assert failure.message
    assert "\n" not in failure.message
    assert Failure.model_validate_json(failure.model_dump_json()) == failure


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
        KeyError("CUDA out of memory"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert memory_failure(error) is None


def test_a_real_refusal_of_this_machine_is_understood() -> None:
    import torch

    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    failure = memory_failure(refused.value)
    assert failure is not None
    assert "can't allocate memory" in failure.message


# Specs


def spec(**changes: Any) -> TrainSpec:
    values: dict[str, Any] = {"output_dir": "/out", "fingerprint": "0" * 32, "inputs": {}, "base_model": "/base"}
    return TrainSpec.model_validate(values | {"dataset": "/data", "plan": plan(**changes)})


def test_a_smaller_stage_differs_in_its_forwards_only() -> None:
    before = spec(token_budget=1000, longest_pair=300)
    after = before.smaller_forwards()
    assert after is not None
    assert after.memory_record() == {"token_budget_used": 500, "out_of_memory_retries": 1}
    put_back = after.model_copy(update={"plan": before.plan, "out_of_memory_retries": 0})
    assert put_back == before
    last = after.smaller_forwards()
    assert last is not None
    assert last.memory_record() == {"token_budget_used": 300, "out_of_memory_retries": 2}
    assert last.smaller_forwards() is None


@pytest.mark.parametrize(
    ("changes", "of_plan", "again"),
    [
        ({"reference_cache": "/cache"}, {}, True),
        ({}, {}, False),
        ({"reference_cache": "/cache"}, {"dpo": {"reference_strategy": "adapter"}}, False),
        ({"reference_cache": "/cache"}, {"dpo": {"trainer": "trl"}}, False),
    ],
    ids=["DPO with a reference pass", "SFT", "DPO that scores its reference at every step", "TRL's own DPO"],
)
def test_only_a_stage_with_a_reference_pass_is_tried_again_for_the_forwards_of_one(
    changes: dict[str, Any], of_plan: dict[str, Any], again: bool
) -> None:
    """The forwards of training have the least size: another process would run out in the same ones."""
    least = spec(token_budget=600, reference_budget=4800, longest_pair=600, **of_plan)
    smaller = least.model_copy(update=changes).smaller_forwards()
    assert (smaller is not None) == again
    assert smaller is None or smaller.smaller_forwards() is None


@pytest.mark.parametrize("kind", [MergeSpec, EvaluateSpec])
def test_a_stage_that_computes_the_release_is_not_tried_again_for_forwards_of_training(
    kind: type[MergeSpec] | type[EvaluateSpec],
) -> None:
    whole = plan(token_budget=4800, longest_pair=600, scoring={"token_budget": 600, "stored": "bf16"})
    folder = {"output_dir": "/out", "fingerprint": "0" * 32, "inputs": {}, "base_model": "/base", "dataset": "/data"}
    of_merge = {"adapter": "/adapter"}
    of_scores = {
        "sft_adapter": None, "policy": "/policy", "confidence": 0.95, "generations": 0, "max_new_tokens": 1,
        "min_pairs": 1,
    }  # fmt: skip
    made = kind.model_validate(folder | {"plan": whole} | (of_merge if kind is MergeSpec else of_scores))
    assert made.largest_forward == 600
    assert made.smaller_forwards() is None
    assert whole.with_half_budget() is not None


def test_a_stage_without_a_plan_has_no_forwards_to_cut() -> None:
    assert not hasattr(TokenizeSpec, "smaller_forwards")


def test_the_identity_of_an_artefact_does_not_know_the_forwards() -> None:
    large, small = plan(token_budget=4096), plan(token_budget=512)
    assert fingerprint("dpo_adapter", large.dpo_part(), {}) == fingerprint("dpo_adapter", small.dpo_part(), {})
