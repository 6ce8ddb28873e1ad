"""This repository's code location: the pipelines declared in `defs/`.

It reads the same `defs.yaml` files as Dagster's folder loader, without it: that loader costs a location 18 % more than
an empty one even for an empty folder (benchmarks/RESULTS.md), and it needs a project file above the package, which an
installed wheel does not have.
"""

from importlib.resources import files
from pathlib import Path

import dagster as dg
import yaml

from dpo_assets.component import build_dpo_defs

PIPELINES = ("demo", "chat")


def pipeline_defs(name: str) -> dg.Definitions:
    """The definitions that `defs/<name>/defs.yaml` declares."""
    folder = Path(str(files("dpo_assets") / "defs" / name))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    attributes = yaml.load((folder / "defs.yaml").read_text(encoding="utf-8"), Loader=loader)["attributes"]
    return build_dpo_defs(attributes.pop("name"), attributes, base_dir=folder)


defs = dg.Definitions.merge(*(pipeline_defs(name) for name in PIPELINES))
