"""The demo pipelines as a code location that also works from a wheel, where `defs/` has no project above it."""

from importlib.resources import files
from pathlib import Path

import dagster as dg
import yaml

from dpo_assets.component import build_dpo_defs

PIPELINES = ("demo", "chat")


def pipeline_defs(name: str) -> dg.Definitions:
    """The definitions that `defs/<name>/defs.yaml` declares."""
    folder = Path(str(files("dpo_assets") / "defs" / name))
    attributes = yaml.safe_load((folder / "defs.yaml").read_text(encoding="utf-8"))["attributes"]
    return build_dpo_defs(attributes.pop("name"), attributes, base_dir=folder)


defs = dg.Definitions.merge(*(pipeline_defs(name) for name in PIPELINES))
