"""The throughput benchmark's own arithmetic, weights and bookkeeping: what its tables rest on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.throughput import data
from benchmarks.throughput.arithmetic import Work, limit_pairs_per_s, work_of
from benchmarks.throughput.cases import CASES, TARGETS
from benchmarks.throughput.gate import Gate
from benchmarks.throughput.measure import seed_adapter
from benchmarks.throughput.models import configuration, read_off, write_weights
from benchmarks.throughput.shapes import LORA_RANK, SHAPES, SMALL, is_tiny

PUBLISHED = [name for name in SHAPES if not is_tiny(name) and not name.startswith(SMALL)]
FAMILIES = ["tiny-phi4-mini", "tiny-qwen3.5-9b", "tiny-gpt-oss-20b", "tiny-qwen3-30b-a3b", "tiny-gemma3-4b"]


def without_weights(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(configuration(SHAPES[name]))


@pytest.fixture(scope="module")
def timed_work() -> Work:
    """The pairs that every case times."""
    rows = data.block(lambda count, seed: data.like_ultrafeedback(list(range(200_000)), count, seed), 0, 3)
    return work_of(rows, 1_024)


def test_every_shape_is_a_configuration_of_transformers() -> None:
    for name, shape in SHAPES.items():
        assert without_weights(name).config.model_type == shape.model_type


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_weights_that_its_place_in_memory_is_planned_by(name: str) -> None:
    parameters = sum(p.numel() for p in without_weights(name).parameters())
    assert parameters * 2 / 2**30 == pytest.approx(SHAPES[name].gib, rel=0.02)


def test_shapes_and_pairs_are_those_of_rows_measured_before(timed_work: Work) -> None:
    """Tokens a pair and pairs/s at the arithmetic limit, as the rows of 2026-11-27 on one H100 have them."""
    assert timed_work.unshared_tokens / timed_work.pairs == pytest.approx(1013.9583, abs=1e-3)
    assert timed_work.shared_tokens / timed_work.pairs == pytest.approx(841.8333, abs=1e-3)
    for name, limit in {"qwen3-8b": 29.506917, "qwen3-1.7b": 124.567042, "gemma3-4b": 56.569845}.items():
        found = limit_pairs_per_s(read_off(SHAPES[name], without_weights(name)), timed_work)
        # Gemma's rows were of 262,144 words; the published text model has 262,208.
        assert found == pytest.approx(limit, rel=1e-4 if name == "gemma3-4b" else 1e-7)


def test_a_window_counts_the_keys_that_are_seen() -> None:
    lengths, window = (3, 32, 100), 32
    seen = sum(min(query + 1, window) for length in lengths for query in range(length))
    # Twice the pairs, a diagonal less: l^2 stands for l (l + 1) / 2 pairs.
    assert Work(1, 0, 0, lengths).attended(window) == 2 * seen - sum(min(length, window) for length in lengths)
    assert Work(1, 0, 0, lengths).attended(None) == sum(length**2 for length in lengths)


def test_of_routed_experts_the_active_ones_count() -> None:
    shape = SHAPES["tiny-qwen3-30b-a3b"]
    layers, hidden, width = (
        shape.arguments[key] for key in ("num_hidden_layers", "hidden_size", "moe_intermediate_size")
    )
    active, head = shape.arguments["num_experts_per_tok"], shape.arguments["head_dim"]
    attention = (
        hidden * head * (2 * shape.arguments["num_attention_heads"] + 2 * shape.arguments["num_key_value_heads"])
    )
    router = hidden * shape.arguments["num_local_experts"]
    found = read_off(shape, without_weights("tiny-qwen3-30b-a3b"))
    assert found.body == layers * (attention + router + active * 3 * hidden * width)


@pytest.mark.parametrize("name", FAMILIES)
def test_written_weights_load_as_they_were(name: str, tmp_path: Path) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(SHAPES[name]))
    model.config.save_pretrained(tmp_path)
    write_weights(revert_weight_conversion(model, model.state_dict()), tmp_path)
    loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    for (key, here), there in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(here, there), key


@pytest.mark.parametrize("name", FAMILIES)
def test_arms_start_from_one_adapter_whatever_wraps_the_model(name: str) -> None:
    """Matrices are seeded by their names below `layers.`, which wrappers do not change, and differ from each other."""
    model = AutoModelForCausalLM.from_config(configuration(SHAPES[name]))
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(SHAPES[name].targets))
    adapted = get_peft_model(model, config)
    seed_adapter(adapted)
    first = {key: value.clone() for key, value in adapted.named_parameters() if "lora_" in key}
    torch.manual_seed(99)
    for parameter in adapted.parameters():
        parameter.data.normal_()
    wrapped = torch.nn.ModuleDict({"wrapper": adapted})
    seed_adapter(wrapped)
    assert all(torch.equal(value, first[key]) for key, value in adapted.named_parameters() if "lora_" in key)
    starts = [value.flatten()[:8] for key, value in first.items() if "lora_A" in key]
    assert len(starts) == len({tuple(start.tolist()) for start in starts})


def test_every_case_has_a_shape_and_every_target_a_case() -> None:
    assert {case.model for case in CASES.values()} <= SHAPES.keys()
    assert {target.case for target in TARGETS} <= CASES.keys()
    assert all(target.against in (*CASES[target.case].arms, "limit", "pairs/s") for target in TARGETS)


def test_arms_that_do_not_fit_the_device_together_take_turns() -> None:
    gate, order = Gate(30.0), list[str]()
    both = threading.Barrier(2, timeout=10)

    def load(who: str, gib: float, *, meets: bool) -> None:
        with gate.hold(who, gib, 5.0, timeout=10):
            order.append(f"{who} begins")
            if meets:
                both.wait()
            order.append(f"{who} ends")

    small = [threading.Thread(target=load, args=(who, 12.0), kwargs={"meets": True}) for who in ("a", "b")]
    for thread in small:
        thread.start()
    for thread in small:
        thread.join()
    assert set(order[:2]) == {"a begins", "b begins"}
    # 5 + 5 GiB lie there now; 22 more are too much while another works, and are let in when nobody does.
    with gate.hold("a", 12.0, 5.0, timeout=10), pytest.raises(TimeoutError), gate.hold("c", 22.0, 5.0, timeout=0.05):
        pass
    with gate.hold("c", 22.0, 5.0, timeout=0.05):
        pass
