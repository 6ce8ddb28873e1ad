"""Unsloth itself, on a CPU, in processes of its own; and what is refused before it is imported.

The tests that drive the real Unsloth need an interpreter that has it: this one, or the one that `UNSLOTH_PYTHON` names.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from dpo_assets.checks.bands import first_loss_tolerance
from dpo_assets.errors import ConfigError
from dpo_assets.planning.plan import TrainingPlan, steps_of
from dpo_assets.training.batches.packing import Group, pack
from dpo_assets.training.engines.unsloth import engine as unsloth_engine
from dpo_assets.training.engines.unsloth import loading as unsloth_loading
from dpo_assets.training.engines.unsloth.engine import UnslothEngine, check_shared_prefix, reference_mode
from dpo_assets.training.engines.unsloth.loading import check_precision, precision_flags, prepare_unsloth
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets_tests.training.conftest import TRAIN_PAIRS, PlanMaker

REPOSITORY = Path(__file__).parents[2]
PYTHON = os.environ.get("UNSLOTH_PYTHON") or (sys.executable if importlib.util.find_spec("unsloth") else "")
needs_unsloth = pytest.mark.skipif(
    not PYTHON, reason="Unsloth is not installed: set UNSLOTH_PYTHON to an interpreter that has it"
)
STEPS = 10
SAME_RUN = 1e-4  # Unsloth's CPU backend takes the fused AdamW, which rounds a little differently.
EXACT = 1e-12
Answer = dict[str, Any]


# ---------------------------------------------------------------------------------------------- before the import


def test_missing_unsloth_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dpo-assets\[unsloth\]'"):
        prepare_unsloth(tmp_path)


def test_a_process_that_imported_transformers_first_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    before = dict(os.environ)
    with pytest.raises(ConfigError, match=r"imported before (trl, )?transformers, peft"):
        prepare_unsloth(tmp_path)
    assert dict(os.environ) == before
    assert not list(tmp_path.iterdir())


def test_the_module_itself_imports_nothing_that_unsloth_patches() -> None:
    code = "import sys, dpo_assets.training.engines.unsloth; print([n for n in sys.modules if n in sys.argv[1:]])"
    line = [sys.executable, "-c", code, *unsloth_loading.PATCHED, "torch"]
    assert subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- asked and loaded


@pytest.mark.parametrize("precision", ["4bit", "8bit", "fp8", "bf16", "fp16", "fp32"])
def test_at_most_one_precision_is_asked_of_unsloth(precision: Any) -> None:
    flags = precision_flags(precision)
    assert sum(flags.values()) == (precision != "fp32")
    assert flags["load_in_4bit"] == (precision == "4bit")


def test_a_base_in_another_precision_than_asked_is_refused(model_folder: Path, plan_for: PlanMaker) -> None:
    """Without bitsandbytes Unsloth prints a line and loads 16 bit."""
    base = load_base(model_folder, plan_for())
    check_precision(base, plan_for())
    for precision in ("4bit", "8bit", "fp8"):
        with pytest.raises(ConfigError, match=f"`{precision}` was asked for.*loaded the base in 16 or 32 bit"):
            check_precision(base, plan_for(precision=precision))
    base.is_loaded_in_4bit = True
    check_precision(base, plan_for(precision="4bit"))
    with pytest.raises(ConfigError, match="loaded the base in 4bit"):
        check_precision(base, plan_for(precision="bf16"))


@pytest.mark.parametrize(("fault", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])])
def test_an_adapter_that_is_not_plain_lora_is_refused(
    fault: str, value: Any, sft_adapter: Path, tmp_path: Path
) -> None:
    config = json.loads((sft_adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {fault: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=fault):
        unsloth_loading._adapter_shape(tmp_path)
    assert unsloth_loading._adapter_shape(sft_adapter)["r"] == config["r"]


# ---------------------------------------------------------------------------------------------- reference and packing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_scored_by_the_policys_own_forward(
    checkpointing: bool, plan_for: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsloth_engine.importlib.metadata, "version", lambda name: "1.2")
    model = torch.nn.Linear(2, 2).eval()
    plan = plan_for(kernels="unsloth", gradient_checkpointing=checkpointing)
    with reference_mode(model, plan.kernels) as path:
        assert model.training
        assert not torch.is_grad_enabled()
        with UnslothEngine(model).as_the_policy():
            assert torch.is_grad_enabled()
    assert path == "unsloth 1.2, the policy's forward"
    assert not model.training
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_after_a_failure(plan_for: PlanMaker) -> None:
    model = torch.nn.Linear(2, 2).eval()

    def fail_while_scoring() -> None:
        with reference_mode(model, plan_for().kernels) as path:
            assert (path, model.training) == ("transformers", True)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail_while_scoring()
    assert not model.training
    assert torch.is_grad_enabled()


lengths = st.integers(1, 9)
shapes = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=3)), min_size=1, max_size=4)


@given(shapes)
def test_a_packed_batch_names_the_lengths_of_its_groups(groups: list[tuple[int, list[int]]]) -> None:
    batch = pack([Group([5] * prompt, tuple([7] * n for n in completions)) for prompt, completions in groups])
    assert batch.groups == groups


sizes = st.integers(1, 300)


@given(st.lists(st.tuples(sizes, st.lists(sizes, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_every_group_begins_on_a_block_of_attention_with_its_tokens_in_order(
    groups: list[tuple[int, list[int]]],
) -> None:
    laid, place = unsloth_engine.on_blocks(groups)
    begins, at = [], 0
    for prompt, completions in laid:
        if completions:
            begins.append(at)
        else:
            assert 0 < prompt < unsloth_engine.ATTENTION_BLOCK
        at += prompt + sum(completions)
    assert [one for one in laid if one[1]] == groups
    assert all(begin % unsloth_engine.ATTENTION_BLOCK == 0 for begin in begins)
    spans = [range(begin, begin + p + sum(c)) for begin, (p, c) in zip(begins, groups, strict=True)]
    assert place.tolist() == [n for span in spans for n in span]


def test_a_model_that_would_ignore_shared_prefixes_is_refused(model_folder: Path, plan_for: PlanMaker) -> None:
    """Unknown arguments vanish in Transformers' forwards, and every completion would see the others."""
    with pytest.raises(ConfigError, match="not on Unsloth's own forward"):
        check_shared_prefix(load_base(model_folder, plan_for()), 10)


@pytest.mark.parametrize(
    ("setting", "reason"), [({"sliding_window": 9}, "within 9 tokens"), ({"attn_logit_softcapping": 50.0}, "caps its")]
)
def test_attention_with_rules_of_its_own_is_refused(setting: dict[str, Any], reason: str) -> None:
    attention = type("Attention", (), {"forward": lambda self: None})
    attention.forward.__module__ = "unsloth.models.mistral"
    decoder = SimpleNamespace(layers=[SimpleNamespace(self_attn=attention())])
    config = SimpleNamespace(**setting)
    config.get_text_config = lambda: config
    lm = SimpleNamespace(get_decoder=lambda: decoder, config=config)
    with pytest.raises(ConfigError, match=reason):
        check_shared_prefix(lm, 10)
    check_shared_prefix(SimpleNamespace(get_decoder=lambda: decoder, config=_plain_config()), 10)


def _plain_config() -> SimpleNamespace:
    config = SimpleNamespace()
    config.get_text_config = lambda: config
    return config


# ---------------------------------------------------------------------------------------------- the real Unsloth


@pytest.fixture(scope="module")
def plan(plan_for: PlanMaker) -> TrainingPlan:
    """Ten steps of the classic recipe: micro-batches of two, gathered to eight."""
    settings = {"learning_rate": 1e-3, "batch_size": 8, "epochs": STEPS * 8 / TRAIN_PAIRS, "trainer": "trl"}
    plan = plan_for(dpo=settings, kernels="unsloth")
    assert steps_of(TRAIN_PAIRS, 8, plan.dpo.epochs) == plan.dpo_steps == STEPS
    return plan


class Driven:
    """Answers of the driver, and the folder it ran in."""

    def __init__(self, folder: Path, *, generated: bool, actions: list[dict[str, Any]]) -> None:
        self.folder, self.working = folder, folder / "working"
        self.working.mkdir()
        request = {"scratch": str(folder / "scratch"), "generated": generated, "actions": actions}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        line = [PYTHON, "-m", "dpo_assets_tests.training.unsloth_driver", str(folder / "request.json")]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            line, cwd=self.working, env=environment, capture_output=True, text=True, timeout=580, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        self.answers: list[Answer] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def action(name: str, out: Path, model: Path, dataset: Path, plan: TrainingPlan, **more: Any) -> dict[str, Any]:
    out.mkdir()
    rows = str(dataset / "train.parquet")
    plain = {"action": name, "out": str(out), "model": str(model), "rows": rows, "plan": plan.model_dump(mode="json")}
    return plain | more


@pytest.fixture(scope="module")
def driven(
    plan: TrainingPlan, model_folder: Path, dataset: Path, sft_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Driven:
    """Unsloth's CPU backend: a fresh adapter, an SFT adapter, and a base in a precision that it cannot load here."""
    folder = tmp_path_factory.mktemp("unsloth")
    checkpointed = plan.model_copy(update={"gradient_checkpointing": True})
    common = (model_folder, dataset)
    return Driven(
        folder,
        generated=False,
        actions=[
            action("load", folder / "fresh", *common, plan),
            action("load", folder / "continued", *common, checkpointed, start_adapter=str(sft_adapter)),
            action("load", folder / "quantised", *common, plan.model_copy(update={"precision": "4bit"})),
        ],
    )


@pytest.fixture(scope="module")
def generated(
    plan: TrainingPlan, model_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Driven:
    """The trainers that Unsloth generates for GPUs."""
    folder = tmp_path_factory.mktemp("generated")
    short = plan.model_copy(update={"dpo_steps": 3})
    common = (model_folder, dataset)
    groups = [[[5, [3, 4]], [2, [1, 6]]], [[1, [1]], [4, [2, 3, 1]]]]
    return Driven(
        folder,
        generated=True,
        actions=[
            action("generated", folder / "run", *common, short),
            action("generated", folder / "bare", *common, short, bare=True),
            action("generated", folder / "switched", *common, short, float32=False),
            action("peft_config_trap", folder / "trap", *common, short),
            {"action": "shared_prefix", "groups": groups},
            action("gpu_loader", folder / "loader", *common, short.model_copy(update={"precision": "fp8"})),
        ],
    )


@needs_unsloth
def test_ten_steps_of_the_classic_recipe_start_at_ln_2_and_learn(driven: Driven) -> None:
    losses = driven.answers[0]["losses"]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(2), abs=first_loss_tolerance(math.log(2)))
    assert losses[-1] < losses[0] - 0.02
    arguments = driven.answers[0]["arguments"]
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == ("2", "4")


@needs_unsloth
def test_training_goes_on_from_the_sft_adapter_as_it_was(driven: Driven) -> None:
    """With Unsloth's checkpointing, and without the dropout that SFT trained with."""
    answer = driven.answers[1]
    assert answer["losses"][0] == pytest.approx(math.log(2), abs=first_loss_tolerance(math.log(2)))
    assert answer["dropouts"] in ([], [0.0])


@needs_unsloth
@pytest.mark.parametrize("name", ["fresh", "continued"])
def test_the_adapter_is_saved_alone_and_loads_without_unsloth(
    name: str, driven: Driven, plan: TrainingPlan, model_folder: Path, sft_adapter: Path
) -> None:
    folder = driven.folder / name / "adapter"
    assert {p.name for p in folder.rglob("*")} == {"adapter_config.json", "adapter_model.safetensors"}
    start = sft_adapter if name == "continued" else None
    begun = attach_adapter(load_base(model_folder, plan), plan, start, seed=plan.dpo.seed, dropout=0.0)
    ended = PeftModel.from_pretrained(load_base(model_folder, plan), folder)
    saved = load_file(folder / "adapter_model.safetensors")
    before, after = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (begun, ended))
    assert before.keys() == after.keys()
    assert len(saved) == len(after)
    distances = [float((after[n] - before[n]).detach().abs().max()) for n in before]
    # Ten steps of Adam move a weight by at most about ten learning rates: it is the same start, and it has moved.
    assert 0 < max(distances) < 2 * STEPS * plan.dpo.learning_rate


@needs_unsloth
def test_a_precision_that_unsloth_quietly_gives_up_is_refused(driven: Driven) -> None:
    assert driven.answers[2]["error"] == "ConfigError"
    assert "`4bit` was asked for" in driven.answers[2]["message"]


@needs_unsloth
def test_nothing_is_written_into_the_working_directory(driven: Driven, generated: Driven) -> None:
    assert list(driven.working.iterdir()) == []
    assert list(generated.working.iterdir()) == []
    assert (generated.folder / "scratch" / "unsloth_compiled_cache" / "UnslothDPOTrainer.py").is_file()


@needs_unsloth
def test_unsloths_generated_trainer_keeps_every_argument(generated: Driven, plan: TrainingPlan) -> None:
    """Its own defaults are others: learning rate 5e-5, batch 4 x 2, adamw_8bit."""
    answer = generated.answers[0]
    assert answer["trainer"] == "UnslothDPOTrainer"
    assert answer["arguments"]["learning_rate"] == str(plan.dpo.learning_rate)
    assert answer["losses"][0] == pytest.approx(math.log(2), abs=1e-6)


@needs_unsloth
def test_a_reference_with_recorded_gradients_gives_the_same_run(generated: Driven, driven: Driven) -> None:
    """The generated trainer scores it so, Unsloth's CPU backend too; both are one run."""
    ours, theirs = generated.answers[0]["losses"], driven.answers[0]["losses"]
    assert ours[:2] == pytest.approx(theirs[:2], abs=SAME_RUN)


@needs_unsloth
def test_a_bare_model_is_refused_where_unsloth_would_train_all_of_it(generated: Driven) -> None:
    assert generated.answers[3] == {"trainable_share": 1.0}, "the trap is gone: the guard may be too"
    assert generated.answers[1]["error"] == "ConfigError"
    assert "`peft_config` given to the trainer is dropped" in generated.answers[1]["message"]


@needs_unsloth
def test_a_precision_that_unsloths_trainer_switches_is_refused_by_name(generated: Driven) -> None:
    answer = generated.answers[2]
    assert answer["error"] == "ConfigError"
    assert "16: asked False, got True" in answer["message"]


@needs_unsloth
def test_unsloths_shared_prefix_attention_is_ours(generated: Driven) -> None:
    assert generated.answers[4]["largest_difference"] < EXACT


@needs_unsloth
def test_unsloths_loader_knows_what_is_asked_of_it(generated: Driven) -> None:
    """An argument it no longer knew would be handed on to Transformers, and the precision would be another."""
    answer = generated.answers[5]
    assert {"load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8", "use_exact_model_name"} < {*answer["asked"]}
    assert answer["handed_on"] == ["local_files_only", "use_safetensors"]


@needs_unsloth
def test_unsloth_after_transformers_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, transformers; from pathlib import Path\n"
        "from dpo_assets.training.engines.unsloth.loading import prepare_unsloth\n"
        "prepare_unsloth(Path(sys.argv[1]))"
    )
    line = [PYTHON, "-c", code, str(tmp_path / "scratch")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "ConfigError: Unsloth must be imported before transformers" in done.stderr
    assert not (tmp_path / "scratch").exists()
