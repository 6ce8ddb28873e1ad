"""Whether a release loads where its base did: merged here, loaded by an earlier Transformers in its own environment.

    python -m venv /somewhere/tf457
    /somewhere/tf457/bin/pip install "transformers==4.57.*" torch safetensors
    python -m benchmarks.load_back --python /somewhere/tf457/bin/python

For each architecture the other environment writes a tiny random base, in the form of config.json and of tensors that it
writes. Here the base gets an adapter on every linear layer and is merged; both environments load the release by the
class that its config.json names. Where the other one does not know an architecture, the base is made here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from benchmarks import load_back_other
from benchmarks.load_back_other import ARCHITECTURES, IDS
from dpo_assets.checks.reports import Carried
from dpo_assets.recipe import EVERY_LINEAR, LoraSection
from dpo_assets.training.models.carrying import compared
from dpo_assets.training.models.loading import load_causal_lm
from dpo_assets.training.models.merging import plan_merge, stream_merge
from dpo_assets.training.models.release_files import write_config
from dpo_assets.training.models.targets import peft_targets

# Keys that Transformers 5 writes in another form than 4: (4, 5).
FORMS = (("rope_theta", "rope_parameters"), ("torch_dtype", "dtype"))
MADE_HERE = frozenset({"llama, saved by 5"})  # In the form that only this environment writes.
OTHER_LOGITS = "other.safetensors"


@dataclass(frozen=True)
class Row:
    """What was seen of one architecture. Differences are the largest of any logit."""

    name: str
    made_by: str
    keys: tuple[str, ...]
    carried: Carried
    moved: float
    here: float
    there: float | None
    base_there: float | None
    why_not: str = ""

    @property
    def holds(self) -> bool:
        """Whether the release is the policy here, and there wherever the base is a model at all, even another one."""
        there = self.there is not None and self.there < EXACT
        return self.carried.whole and self.here < EXACT < self.moved and there == (self.base_there is not None)


EXACT = 1e-4  # fp32 on both sides, whose kernels may differ by versions of torch.


def run(python: str, work: Path, names: Sequence[str] = tuple(ARCHITECTURES)) -> tuple[str, list[Row]]:
    """(version of the other Transformers, rows).

    Args:
        python: interpreter of the other environment.
        work: an empty folder.
    """
    bases, releases = work / "base", work / "release"
    asked = {name: bases / name for name in names if name not in MADE_HERE}
    version, refused = there(python, work, "make", asked)
    refused |= dict.fromkeys(MADE_HERE.intersection(names), "made here")
    for name in (name for name in names if refused[name]):
        shutil.rmtree(bases / name, ignore_errors=True)
        load_back_other.make(name, bases / name)
    merged = {name: _merged(bases / name, releases / name) for name in names}
    _, failed = there(python, work, "logits", {name: releases / name for name in names})
    _, base_failed = there(python, work, "logits", {name: bases / name for name in names})

    def gap(folder: Path, failed: str) -> float | None:
        here = load_back_other.logits_of(folder.name, folder)
        return None if failed else _gap(load_file(folder / OTHER_LOGITS)["logits"], here)

    return version, [
        Row(
            name,
            transformers.__version__ if refused[name] else version,
            _keys(releases / name / "config.json"),
            carried,
            moved,
            here=_gap(load_back_other.logits_of(name, releases / name), by_adapter),
            there=gap(releases / name, failed[name]),
            base_there=gap(bases / name, base_failed[name]),
            why_not=failed[name],
        )
        for name, (by_adapter, carried, moved) in merged.items()
    ]


@torch.no_grad()
def _merged(base: Path, release: Path) -> tuple[torch.Tensor, Carried, float]:
    """(logits of base + adapter, what became of the tensors, how far the adapter moves a logit)."""
    torch.manual_seed(1)
    ids = torch.tensor([IDS])
    lm, _ = load_causal_lm(base, dtype=torch.float32, attn_implementation="eager")
    start = lm.eval()(input_ids=ids).logits[0]
    targets = peft_targets(lm, LoraSection(target_modules=EVERY_LINEAR))
    model = get_peft_model(lm, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets))
    assert isinstance(model, PeftModel)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.add_(torch.randn_like(value), alpha=0.05)
    adapter = release.parent.parent / "adapter" / release.name
    model.save_pretrained(str(adapter))
    logits = model.eval()(input_ids=ids).logits[0]
    release.mkdir(parents=True)
    merge = plan_merge(base, adapter)
    stream_merge(merge, release)
    write_config(base, release)
    return logits, compared(base, release, merge.updates.keys()), _gap(logits, start)


def there(
    python: str, work: Path, do: str, folders: dict[str, Path], out: str = OTHER_LOGITS
) -> tuple[str, dict[str, str]]:
    """(version of Transformers, per name why it could not) of the other environment."""
    request = work / f"{do}.json"
    spoken = {"do": do, "out": out, "folders": {name: str(folder) for name, folder in folders.items()}}
    request.write_text(json.dumps(spoken), encoding="utf-8")
    subprocess.run([python, str(Path(load_back_other.__file__)), str(request)], check=True, cwd=work)
    told: dict[str, Any] = json.loads(request.with_suffix(".answer.json").read_text(encoding="utf-8"))
    return str(told["version"]), dict(told["said"])


def _keys(config: Path) -> tuple[str, ...]:
    """Which of the keys with two forms a config.json has, its text part included."""
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    held = values.keys() | (values.get("text_config") or {}).keys()
    return tuple(key for form in FORMS for key in form if key in held)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of an environment with an earlier Transformers")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="dpo-assets-load-back-") as work:
        version, rows = run(arguments.python, Path(work))
    print(f"here: transformers {transformers.__version__}; there: {version}; largest difference of any logit\n")
    print(
        "| architecture | base by | config keys | tensors kept, adapted | adapter moves | here | there | base there |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        kept = f"{row.carried.tensors - row.carried.adapted}, {row.carried.adapted}"
        there = f"{row.there:.1g}" if row.there is not None else f"not loaded: {row.why_not[:70]}"
        base = f"{row.base_there:.1g}" if row.base_there is not None else "not loaded"
        print(
            f"| {row.name} | {row.made_by} | {', '.join(row.keys)} | {kept} | {row.moved:.2g} | {row.here:.1g} "
            f"| {there} | {base} |{'' if row.holds else ' FAULT'}"
        )


if __name__ == "__main__":
    main()
