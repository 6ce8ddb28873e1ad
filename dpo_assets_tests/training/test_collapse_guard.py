"""A DPO run that is watched: what is logged and probed, when it is stopped, what is kept, what is measured after it.

Real runs of the embedded model on real pairs. A collapse is brought about by its commonest cause, a learning rate that
is far too high.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from dpo_assets.checks.bands import default_bands
from dpo_assets.checks.collapse import CollapseLimits, first_trigger
from dpo_assets.checks.evidence.clusters import COUNTED_BY
from dpo_assets.checks.reports import AdapterNorm, HeldOutPairs, NotMeasured
from dpo_assets.contract import GuardSpec, TrainSpec
from dpo_assets.errors import ConfigError
from dpo_assets.recipe import BandOverride, ChecksSection
from dpo_assets.training.batches.data import dpo_group, load_asked, load_split
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.guard.aftermath import measure, product_norm
from dpo_assets.training.guard.collapse import CollapseGuard, advice, near_identical
from dpo_assets.training.guard.sampling import AdapterState, Watched, attach_scorer, first_prompts
from dpo_assets.training.models.chat_format import ChatFormat
from dpo_assets.training.models.loading import attach_adapter, load_base
from dpo_assets.training.policy import load_policy
from dpo_assets.training.stages import dpo
from dpo_assets.training.trainers.classic import classic_trainer
from dpo_assets.training.trainers.packed import end_quietly
from dpo_assets_tests.training.conftest import Log, PlanMaker, SpecMaker
from dpo_assets_tests.training.dpo_runs import ROW, Run, largest_difference, run_dpo, short_plan, write_pairs
from dpo_assets_tests.training.trl_dense_scoring import dense_scoring

STEPS, PAIRS = 12, 4
RUINOUS = 0.1
CHECKS = ChecksSection(probe_prompts=2, probe_every=0.17, probe_tokens=8, held_out_pairs=4, sampled_answers=3)
QUIET = CHECKS.model_copy(update={"probe_prompts": 0, "sampled_answers": 0, "held_out_pairs": 0})


@pytest.fixture(scope="module")
def pairs(prepared: tuple[pl.DataFrame, pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few short pairs to train on and a few that are held out."""
    folder = write_pairs(prepared[0], tmp_path_factory.mktemp("pairs"), PAIRS)
    held_out = write_pairs(prepared[1], tmp_path_factory.mktemp("held"), PAIRS)
    (held_out / "train.parquet").rename(folder / "eval.parquet")
    return folder


@pytest.fixture(scope="module")
def spec_of(plan_for: PlanMaker, train_spec: SpecMaker, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`spec_of(learning_rate, checks)`: a guarded run of STEPS steps."""

    def make(rate: float, checks: ChecksSection | None = CHECKS, steps: int = STEPS, **more: Any) -> TrainSpec:
        section = {"learning_rate": rate, "schedule": "constant", **more.pop("dpo", {})}
        plan = short_plan(plan_for, section, steps=steps, train_pairs=PAIRS)
        bands = default_bands().with_overrides(checks.bands) if checks else default_bands()
        guard = GuardSpec.of(plan, bands, checks) if checks else None
        return train_spec(plan, tmp_path_factory.mktemp("run") / "out", dataset=pairs, guard=guard, **more)

    return make


@pytest.fixture(scope="module")
def healthy(spec_of: Any) -> Run:
    return run_dpo(spec_of(1e-4))


@pytest.fixture(scope="module")
def ruined(spec_of: Any) -> Run:
    return run_dpo(spec_of(RUINOUS))


@pytest.fixture(scope="module")
def noted(spec_of: Any) -> Run:
    """The same ruinous rate where `collapse` only warns."""
    return run_dpo(spec_of(RUINOUS, CHECKS.model_copy(update={"severity": {"collapse": "warn"}, "sampled_answers": 8})))


def start_factors(spec: TrainSpec) -> dict[str, torch.Tensor]:
    policy = load_policy(spec.base_model, spec.plan, None, seed=spec.plan.dpo.seed, dropout=0.0)
    return AdapterState(policy.model).factors


# A run that is well


def test_a_healthy_run_goes_to_its_end_and_says_that_nothing_fired(healthy: Run) -> None:
    assert healthy.report["stopped"] is None
    assert healthy.report["trigger"] is None
    assert healthy.report["steps"] == STEPS
    assert healthy.report["finite"]


def test_every_log_says_how_far_the_answers_moved(healthy: Run) -> None:
    for row in healthy.rows:
        reference = row["logps/chosen"] - row["rewards/chosen"] / 0.1
        assert row["nll_ratio"] == pytest.approx(row["logps/chosen"] / reference, rel=1e-4)
        assert math.copysign(1, row["chosen_nats_per_token"]) == math.copysign(1, row["rewards/chosen"])
        assert {"rejected_nats_per_token", "mean_token_accuracy", "entropy"} <= row.keys()
    assert (healthy.rows[0]["nll_ratio"], healthy.rows[0]["chosen_nats_per_token"]) == pytest.approx((1, 0), abs=1e-5)


def test_answers_are_probed_as_often_as_the_recipe_says_and_not_after_the_last_step(healthy: Run) -> None:
    probed = [row["step"] for row in healthy.rows if "probe/repetition" in row]
    assert probed == [2, 4, 6, 8, 10]
    row = healthy.rows[1]
    assert row["probe/answers"] == 2
    assert 0 <= row["probe/no_eos"] <= 1
    assert 0 <= row["probe/distinct_2"] <= 1
    assert 1 <= row["probe/mean_tokens"] <= 8
    assert abs(row["probe/kl_per_token"]) < 0.05


def test_being_watched_changes_nothing_about_what_is_trained(healthy: Run, spec_of: Any) -> None:
    alone = run_dpo(spec_of(1e-4, None))
    assert largest_difference(healthy.adapter, alone.adapter) == 0.0
    assert [row["loss"] for row in alone.rows] == healthy.losses
    assert not any(name.startswith("probe/") for row in alone.rows for name in row)


def test_with_the_sampled_probe_off_nothing_is_generated(spec_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an answer was generated")

    monkeypatch.setattr("dpo_assets.training.guard.sampling.generate", refuse)
    run = run_dpo(spec_of(1e-4, QUIET, steps=4))
    assert not any(name.startswith("probe/") for row in run.rows for name in row)
    assert run.report["answers"] == {"not_measured": "checks.sampled_answers is 0"}
    assert run.report["held_out"] == run.report["capability"] == {"not_measured": "checks.held_out_pairs is 0"}


# A run that collapses


def test_a_ruinous_rate_stops_the_run_and_the_report_says_why(ruined: Run) -> None:
    stopped = ruined.report["stopped"]
    assert stopped["step"] == ruined.report["steps"] == ruined.rows[-1]["step"] < STEPS
    assert stopped["steps_saved"] == STEPS - stopped["step"]
    assert stopped["of_steps"] == STEPS
    assert 0 <= stopped["kept_step"] < stopped["step"]
    assert stopped["value"] > stopped["limit"] or stopped["metric"] in ("mean_token_accuracy", "chosen_nats_per_token")
    assert stopped["band"]
    assert "arXiv" in stopped["source"]
    assert stopped["fix"].startswith("lower dpo.learning_rate from 0.1 to 5e-05 or below")
    assert any("Stopped; the adapter of step" in message for message in ruined.messages)


def test_the_rules_find_the_same_step_in_the_log_that_was_written(ruined: Run, spec_of: Any) -> None:
    found = first_trigger(ruined.rows, spec_of(RUINOUS).guard.limits)
    assert found is not None
    assert (found.step, found.rule) == (ruined.report["stopped"]["step"], ruined.report["stopped"]["rule"])


def test_the_adapter_is_that_of_the_last_healthy_step(ruined: Run, spec_of: Any) -> None:
    kept = ruined.report["stopped"]["kept_step"]
    spec = spec_of(RUINOUS, None)
    if kept:
        # The same run, ended there: the schedule is constant, so its first steps are the same steps.
        spec = spec_of(RUINOUS, None, steps=kept)
        expected = run_dpo(spec).adapter
    else:
        expected = {name.replace(".default.", "."): p for name, p in start_factors(spec).items()}
    assert largest_difference(ruined.adapter, expected) == 0.0


def test_a_state_in_the_middle_of_a_run_is_put_back_whole(spec_of: Any) -> None:
    # Healthy until step 4, by the limits; then a limit that anything breaks.
    class Late(CollapseGuard):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                self.guard = self.guard.model_copy(
                    update={"limits": self.guard.limits.model_copy(update={"kl_per_token": -9.0})}
                )
            super().on_step_end(args, state, control, **kwargs)

    spec = spec_of(1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "CollapseGuard", Late)
        run = run_dpo(spec)
    assert (run.report["stopped"]["kept_step"], run.report["stopped"]["step"]) == (4, 6)
    assert run.report["stopped"]["rule"] == "kl"
    expected = run_dpo(spec_of(1e-3, None, steps=4)).adapter
    assert largest_difference(run.adapter, expected) == 0.0


@pytest.mark.parametrize(("nll_ratio", "kept_step"), [(1.0, 2), (1.6, 0)], ids=["healthy", "with a sign"])
def test_a_state_is_kept_only_while_the_run_shows_no_sign(
    spec_of: Any, chat: ChatFormat, tmp_path: Path, nll_ratio: float, kept_step: int
) -> None:
    """A sign stops nothing by itself, but a state that shows one is none to go back to."""
    spec = spec_of(1e-4, QUIET)
    policy = load_policy(spec.base_model, spec.plan, None, seed=0, dropout=0.0)
    start = AdapterState(policy.model)
    watched = Watched(policy.model, start, chat, spec.plan, "transformers")
    guard = CollapseGuard(watched, spec.guard, Log(), [], [], (8.0, 8.0))
    state, control, arguments = TrainerState(max_steps=STEPS), TrainerControl(), TrainingArguments(str(tmp_path))
    for step in (1, 2):
        state.global_step = step
        log = {"loss": 0.69, "nll_ratio": nll_ratio, "chosen_nats_per_token": -0.4, "step": step}
        state.log_history.append(log)
        guard.on_step_end(arguments, state, control)
        guard.on_log(arguments, state, control, logs=log)
    assert guard.first is None
    assert guard.kept_step == kept_step
    assert (guard.kept is guard.begun) == (kept_step == 0)


def test_with_severity_warn_it_is_recorded_and_training_goes_on(ruined: Run, noted: Run) -> None:
    assert noted.report["stopped"] is None
    assert noted.report["steps"] == STEPS
    assert noted.report["trigger"]["step"] == ruined.report["stopped"]["step"]
    assert noted.report["trigger"]["steps_saved"] == 0
    assert largest_difference(noted.adapter, ruined.adapter) > 0


def test_a_pipelines_own_limits_decide(spec_of: Any) -> None:
    far = dict.fromkeys(("nll_ratio", "accuracy_fall", "chosen_fall", "kl_per_token"), 1e9)
    far |= {"entropy_low": 0.0, "entropy_high": 1e9, "answers_rise": 2.0}
    bands = {"collapse": BandOverride(numbers=far, reason="a run that is meant to collapse")}
    spec = spec_of(RUINOUS, QUIET.model_copy(update={"bands": bands}), steps=7)
    assert "meant to collapse" in spec.guard.source
    assert run_dpo(spec).report["stopped"] is None


# What is measured afterwards


def test_the_parts_of_the_report_are_numbers_of_policy_and_reference(healthy: Run) -> None:
    held_out, said = healthy.report["held_out"], healthy.report["answers"]
    assert held_out["pairs"] == PAIRS
    assert held_out["nll_ratio"] == pytest.approx(1.0, abs=0.05)
    assert (said["prompts"], said["policy"]["answers"], said["reference"]["answers"]) == (3, 3, 3)
    assert said["longer"] + said["shorter"] <= 3
    assert abs(said["kl"]["per_token"]) < 0.05
    assert said["kl"]["low"] is said["kl"]["high"] is None, "three answers have no interval"
    assert healthy.report["capability"]["kind"] == "token_accuracy"
    assert 0 < healthy.report["adapter_norm"]["largest"] < 0.05


def test_a_policy_that_was_ruined_is_seen_in_every_part(noted: Run) -> None:
    report = noted.report
    # The loss of chosen answers, policy over reference: they became less likely. (TRL's rewards are beta x log-ratio.)
    last = noted.rows[-dpo.LAST_LOGS :]
    logps, rewards = (sum(row[key] for row in last) for key in ("logps/chosen", "rewards/chosen"))
    assert report["nll_ratio"] == pytest.approx(logps / (logps - rewards / 0.1), rel=1e-6)
    assert report["nll_ratio"] > 1.5
    assert report["held_out"]["nll_ratio"] > 1.5
    assert report["answers"]["kl"]["per_token"] > 0.5
    assert report["capability"]["policy"] < report["capability"]["reference"]
    assert report["adapter_norm"]["largest"] > 0.3


@pytest.fixture(scope="module")
def watched(spec_of: Any, chat: ChatFormat) -> Watched:
    """A policy that moved away from its start by hand."""
    spec = spec_of(1e-4)
    policy = load_policy(spec.base_model, spec.plan, None, seed=0, dropout=0.0)
    start = AdapterState(policy.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return Watched(policy.model, start, chat, spec.plan, "transformers")


def test_the_divergence_scores_an_answer_with_the_token_that_ended_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which need not be the tokenizer's EOS: Gemma's turns end with another."""
    scored: list[Group] = []
    score = Watched.scores

    def recorded(self: Watched, groups: Any) -> tuple[list[float], list[int]]:
        scored.extend(groups)
        return score(self, groups)

    monkeypatch.setattr(Watched, "scores", recorded)
    answers = [{"ids": [5, 6], "ended": True, "end": 7}, {"ids": [8], "ended": False, "end": None}]
    parts = watched.divergence([[1, 3], [1, 4]], answers)
    assert [group.completions for group in scored[:2]] == [([5, 6, 7],), ([8],)]
    assert [tokens for _, tokens in parts] == [3, 1]


def test_the_reference_is_the_start_and_the_policy_is_back_afterwards(watched: Watched, pairs: Path) -> None:
    groups = [dpo.dpo_group(row, ROW) for row in load_split(pairs, "eval")]
    before, policy = AdapterState(watched.model).factors, watched.scores(groups)[0]
    reference = watched.reference_scores(groups)[0]
    with watched.model.disable_adapter():
        assert reference == pytest.approx(watched.scores(groups)[0], abs=1e-3)
    assert reference != pytest.approx(policy, abs=1e-2)
    assert watched.scores(groups)[0] == policy
    assert all(torch.equal(now, before[name]) for name, now in AdapterState(watched.model).factors.items())


def test_divergence_is_the_log_ratio_of_the_policys_own_answers(watched: Watched, pairs: Path) -> None:
    prompts = first_prompts(load_asked(pairs, "train"), watched.chat, 2, ROW - 8)
    answers = watched.answers(prompts, 8, seed=1)
    assert answers == watched.answers(prompts, 8, seed=1)
    assert answers != watched.answers(prompts, 8, seed=2)
    lm = watched.model
    for prompt, answer, (ratio, tokens) in zip(prompts, answers, watched.divergence(prompts, answers), strict=True):
        ids = torch.tensor([[*prompt, *answer["ids"]]])
        assert tokens == len(answer["ids"]) + answer["ended"]
        both = []
        for context in (watched.start.in_place(lm), torch.no_grad()):
            with context, torch.no_grad(), dpo_plain(lm):
                logits = lm(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                both.append(float(logits.gather(-1, ids[0, len(prompt) :, None]).sum()))
        if not answer["ended"]:
            assert ratio == pytest.approx(both[1] - both[0], abs=1e-3)


def dpo_plain(model: Any) -> Any:
    from dpo_assets.training.engines.attention import plain_attention

    return plain_attention(model)


def test_sampling_leaves_the_random_state_of_training_alone(watched: Watched, pairs: Path) -> None:
    prompts = first_prompts(load_asked(pairs, "train"), watched.chat, 1, ROW - 8)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    watched.answers(prompts, 8, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_adapters_norm_is_that_of_the_whole_product(watched: Watched) -> None:
    from dpo_assets.training.guard.aftermath import adapter_norm

    found, layers = adapter_norm(watched.model, watched.start), []
    for name, layer in watched.model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            scale = layer.scaling["default"]
            layers.append((float((scale * b @ a).norm() / layer.get_base_layer().weight.norm()), name))
    expected, where = max(layers)  # B is zero at the start, so the start's product is too.
    assert isinstance(found, AdapterNorm)
    assert found.largest == pytest.approx(expected, rel=1e-5)
    assert where.endswith(found.layer)
    assert found.layers == len(layers) == 35
    unmoved = adapter_norm(watched.model, AdapterState(watched.model))
    assert isinstance(unmoved, AdapterNorm)
    assert unmoved.largest == pytest.approx(0, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_norm_of_a_product_needs_no_product(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(7, rank, generator=generator, dtype=torch.double)
    a = torch.randn(rank, 5, generator=generator, dtype=torch.double)
    assert product_norm(b, a) == pytest.approx(float((b @ a).norm()), rel=1e-9)
    assert math.isnan(product_norm(b * math.nan, a))


def test_what_cannot_be_measured_says_why(watched: Watched, spec_of: Any) -> None:
    guard = spec_of(1e-4).guard
    part = measure(watched, guard, None, [])
    assert part.held_out == part.capability == NotMeasured(not_measured="the dataset has no held-out pairs")
    assert isinstance(part.answers, NotMeasured)
    assert "no held-out prompt leaves room" in part.answers.not_measured
    on_unsloth = Watched(watched.model, watched.start, watched.chat, watched.plan, "unsloth")
    unasked = measure(on_unsloth, guard, None, []).answers
    assert isinstance(unasked, NotMeasured)
    assert "Unsloth" in unasked.not_measured
    assert "no packed scorer" in on_unsloth.why_no_scores


@pytest.mark.parametrize("strategy", ["adapter", "merged", "model"])
def test_every_reference_strategy_is_measured_against_its_start(spec_of: Any, sft_adapter: Path, strategy: str) -> None:
    checks = QUIET.model_copy(update={"held_out_pairs": 2})
    spec = spec_of(1e-12, checks, steps=1, dpo={"reference_strategy": strategy}, start_adapter=sft_adapter)
    report = run_dpo(spec).report
    assert report["held_out"]["nll_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert report["capability"]["reference"] == report["capability"]["policy"]
    assert report["adapter_norm"]["largest"] < 1e-6


# The user's own tasks


def tasks_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_users_tasks_are_answered_at_every_probe_and_afterwards(spec_of: Any, tmp_path: Path) -> None:
    tasks = tasks_file(
        tmp_path,
        {"prompt": "Hi", "answers": list("aeiou")},  # Met by any answer with a vowel.
        {"prompt": "Hi", "answers": ["no model of stories says this"]},
    )
    checks = QUIET.model_copy(update={"capability_probe": str(tasks)})
    report = run_dpo(spec := spec_of(1e-4, checks, steps=4)).report
    rows = [json.loads(line) for line in (spec.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["probe/capability"] for row in rows if "probe/capability" in row] == [0.5] * 3
    assert report["capability"] == {
        "kind": "tasks",
        "tasks": 2,
        "reference": 0.5,
        "policy": 0.5,
        "lost": 0,
        "gained": 0,
    }
    assert spec.guard.tasks_digest


def test_a_task_that_leaves_no_room_for_an_answer_is_refused(spec_of: Any, tmp_path: Path) -> None:
    tasks = tasks_file(tmp_path, {"prompt": "long " * 200, "answers": ["x"]})
    checks = QUIET.model_copy(update={"capability_probe": str(tasks)})
    with pytest.raises(ConfigError, match="leaves no room for an answer"):
        run_dpo(spec_of(1e-4, checks, steps=1))


# TRL's own trainer


@pytest.fixture
def _dense() -> Iterator[None]:
    with dense_scoring():
        yield


@pytest.mark.usefixtures("_dense")
def test_trls_own_trainer_is_watched_too(
    plan_for: PlanMaker, dataset: Path, model_folder: Path, chat: ChatFormat, tmp_path: Path
) -> None:
    section = {"trainer": "trl", "learning_rate": 1e-3, "warmup_ratio": 0.0}
    plan = plan_for(dpo=section)
    model = attach_adapter(load_base(model_folder, plan), plan, None, seed=0, dropout=0.0)
    trainer = classic_trainer(
        model, chat.tokenizer, load_split(dataset, "train", ["prompt", "chosen", "rejected"]), plan, tmp_path
    )
    limits = CollapseLimits.of(default_bands(), losses=("sigmoid",), beta=0.1)
    guard_spec = GuardSpec(limits=limits, source="-", probe_prompts=2, probe_every=0.34, probe_tokens=8)
    longest = max(
        (dpo_group(row, plan.max_length) for row in load_split(dataset, "train")), key=lambda g: g.longest_row
    )
    attach_scorer(model, plan, longest)
    assert model.get_base_model().config._attn_implementation == "sdpa", "TRL trains it as it was"
    watched = Watched(model, AdapterState(model), chat, plan, "transformers")
    prompts = first_prompts(load_asked(dataset, "train"), chat, 2, 150)
    guard = CollapseGuard(watched, guard_spec, Log(), prompts, [], (50.0, 40.0))
    end_quietly(trainer, [guard])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert rows[0]["nll_ratio"] == pytest.approx(1, abs=1e-4)
    assert rows[-1]["chosen_nats_per_token"] == pytest.approx(rows[-1]["rewards/chosen"] / 0.1 / 50.0)
    assert math.isfinite(rows[0]["probe/kl_per_token"])
    assert "ref" in model.peft_config
    rows = load_asked(dataset, "eval", more=[COUNTED_BY])
    of_two = rows.remove_columns(COUNTED_BY).add_column(COUNTED_BY, ["a"] * 5 + ["b"] * (len(rows) - 5))
    held = measure(watched, guard_spec, of_two, []).held_out
    assert isinstance(held, HeldOutPairs)
    assert (held.pairs, held.accuracy.clusters) == (10, 2)
    assert list(held.margins) == list(rows["pair_id"])
    assert held.margin_nats == pytest.approx(sum(held.margins.values()) / 10)
    assert all(".default." in name for name in watched.start.factors)


# Advice


@pytest.mark.parametrize(
    ("section", "similar", "said"),
    [
        ({"learning_rate": 1e-3}, False, "lower dpo.learning_rate from 0.001 to 5e-05 or below"),
        ({"learning_rate": 2e-5, "beta": 0.01}, False, "raise dpo.beta from 0.01 to 0.1"),
        ({"learning_rate": 2e-5, "beta": 1.0, "loss": "sigmoid_norm"}, False, "raise dpo.beta from 1 to 5"),
        ({"learning_rate": 2e-5}, True, "set dpo.loss to [sigmoid, sft]"),
        ({"learning_rate": 2e-5}, False, "lower dpo.learning_rate 5 to 10 times, to 2e-06 to 4e-06"),
    ],
)
def test_the_fix_names_the_likely_knob(plan_for: PlanMaker, section: dict[str, Any], similar: bool, said: str) -> None:
    plan = plan_for(dpo=section)
    assert said in advice(plan, GuardSpec.of(plan, default_bands(), CHECKS), similar)


def test_the_advised_rate_lies_in_its_band(plan_for: PlanMaker) -> None:
    plan = plan_for(dpo={"learning_rate": 1e-3, "beta": 0.01})
    assert "to 5e-05 or below" in advice(plan, GuardSpec.of(plan, default_bands(), CHECKS), False)


@pytest.mark.parametrize(("loss", "beta"), [("sppo_hard", 0.001), ("ipo", 0.01), ("sigmoid", 0.05)])
def test_a_beta_that_is_not_weak_for_its_loss_is_not_advised_against(
    plan_for: PlanMaker, loss: str, beta: float
) -> None:
    plan = plan_for(dpo={"loss": loss, "beta": beta})
    assert "dpo.beta" not in advice(plan, GuardSpec.of(plan, default_bands(), CHECKS), False)


def test_near_identical_pairs_are_told_from_others(pairs: Path) -> None:
    rows = load_split(pairs, "train")
    assert not near_identical(rows, 0.3)
    twins = rows.map(lambda row: {"rejected_ids": [*row["chosen_ids"][:-1], 1]})
    assert near_identical(twins, 0.3)


def test_a_kept_file_holds_no_second_adapter(ruined: Run) -> None:
    names = load_file(ruined.folder / "adapter" / "adapter_model.safetensors").keys()
    assert not [name for name in names if ".ref." in name]
