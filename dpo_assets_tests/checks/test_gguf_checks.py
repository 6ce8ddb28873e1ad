"""What the check of a GGUF file says of each fault."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dpo_assets.checks.gguf import MOST_KL, gguf_verdicts
from dpo_assets.checks.reports import GgufNames, NotMeasured
from dpo_assets_tests.samples import gguf_report


def by_name(**changes: Any) -> GgufNames:
    return GgufNames(**{"same": 46, "resorted": (), "others": (), "unplaced": (), "beyond": ()} | changes)


NOT_COMPARED = NotMeasured(not_measured="Transformers does not read it: no such architecture")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"not_finite": ("blk.0.attn_q.weight",)}, "NaN or infinity in blk.0.attn_q.weight"),
        ({"weights": {"differing": tuple(f"layer.{n}" for n in range(7))}}, "layer.4 and 2 more"),
        ({"weights": {"kl_per_token": 2 * MOST_KL}}, "KL 0.0272"),
        ({"weights": {"kl_per_token": math.nan}}, "KL nan"),
        ({"settings": ("rope.freq_base: 10000, not 500000",)}, "rope.freq_base"),
        ({"tokenizer": ("another chat template",)}, "another chat template"),
        ({"weights": NOT_COMPARED, "values": 259_968}, "64 of 260,032 values are left out"),
    ],
)
def test_a_file_that_is_another_model_fails_with_what_differs(changes: dict[str, Any], said: str) -> None:
    [verdict] = gguf_verdicts(gguf_report(**changes))
    assert verdict.level == "error"
    assert said in str(verdict.value)
    assert "do not use the file" in verdict.fix


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": NOT_COMPARED}, "no such architecture"),
        ({"weights": NOT_COMPARED, "names": NotMeasured(not_measured="gguf does not know it")}, "does not know it"),
        ({"weights": NOT_COMPARED, "names": by_name(others=("a.weight",))}, "a.weight hold other values"),
        ({"weights": NOT_COMPARED, "names": by_name(unplaced=("b.weight",))}, "b.weight have no name"),
        ({"serving": ("llama.cpp puts <s> before a prompt",)}, "<s> before a prompt"),
    ],
)
def test_what_could_not_be_compared_or_is_served_otherwise_is_warned_of(changes: dict[str, Any], said: str) -> None:
    [verdict] = gguf_verdicts(gguf_report(**changes))
    assert verdict.level == "warn"
    assert said in verdict.fix


def test_tensors_that_were_compared_by_name_are_counted() -> None:
    [verdict] = gguf_verdicts(gguf_report(weights=NOT_COMPARED, names=by_name()))
    assert "46 of 46 hold the merged model's values" in str(verdict.value)
