"""`base_model`: the starting model as a local folder with a digest."""

from __future__ import annotations

import os
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from dpo_assets.artifact import write_json
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.planning.model_folder import KEPT, ModelFolder, inspect_model
from dpo_assets.publishing.secrets import scrub
from dpo_assets.recipe import BUILTIN, BaseModelSection, looks_like_hub_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BUILTIN_MODELS = {"stories260k": ("data/stories260k", "mit")}
FACTS = "model.json"


def materialise(step: Step) -> Events:
    """Fetches or links the model; a model with pickled weights only is shown as a failed check, and not kept."""
    section = step.recipe.base_model
    refused: list[Verdict] = []

    def refuse(facts: ModelFolder) -> None:
        refused.extend(v for v in verdicts(section, facts) if v.level == "error")
        if refused:
            raise _Refused

    def make(folder: Path, _: str) -> None:
        model = folder / "model"
        if looks_like_hub_id(section.source):
            _download(step.hub.api(), section, model)
        else:
            source, _licence = local_source(section)
            refuse(inspect_model(source))
            _copy(source, model)
        if section.chat_template is not None:
            _add_template(Path(section.chat_template), model)
        facts = inspect_model(model)
        refuse(facts)
        if not facts.has_chat_template:
            raise ConfigError(
                f"{section.source} has no chat template; set `base_model.chat_template` to a Jinja file, or start from "
                "an instruct model."
            )
        licence = section.licence or facts.licence or builtin_licence(section)
        described = facts.shape.model_dump() | {"architecture": facts.architecture, "licence": licence}
        write_json(folder / FACTS, described | {"source": section.source, "revision": section.revision})

    try:
        artifact, reused = step.build("base_model", _identity(section), step.inputs(), make)
    except _Refused:
        for verdict in refused:
            yield step.check_result("base_model", verdict)
        message = "; ".join(f"{v.headline}. {v.fix}" for v in refused)
        raise dg.Failure(description=message, allow_retries=False) from None
    described = artifact.json(FACTS)
    yield from step.result(
        "base_model",
        artifact,
        reused,
        verdicts(section, inspect_model(artifact.path / "model")),
        {
            "source": section.source,
            "revision": section.revision or "local",
            "licence": described["licence"],
            "architecture": described["architecture"],
            "parameters": described["parameters"],
        },
    )


class _Refused(Exception):
    """The folder fails a gate, so there is nothing to keep."""


def verdicts(section: BaseModelSection, facts: ModelFolder) -> list[Verdict]:
    """The gates of a starting model."""
    pinned = not looks_like_hub_id(section.source) or section.revision is not None
    licence = section.licence or facts.licence or builtin_licence(section)
    safe = bool(facts.safetensors)
    return [
        Verdict(
            "revision_pinned",
            "pass" if pinned else "error",
            section.revision or "local files, identified by their digest",
            "a commit sha for a Hub model",
            "a branch name can move between two runs",
            "" if pinned else "set base_model.revision to the 40-digit commit sha",
        ),
        Verdict(
            "safetensors_only",
            "pass" if safe else "error",
            ", ".join((facts.safetensors or facts.pickled)[:4]) or "no weights",
            "*.safetensors",
            "a pickled weight file can run code when it is loaded",
            "" if safe else "convert the weights: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)",
        ),
        Verdict(
            "licence_known",
            "pass" if licence else "error",
            licence or "none stated",
            "an SPDX id from the recipe or the model card",
            "a release inherits the licence of its base",
            "" if licence else "set base_model.licence (for example apache-2.0) after reading the model's terms",
        ),
    ]


def local_source(section: BaseModelSection) -> tuple[Path, str | None]:
    """Folder of a built-in or local model, and the licence known for it.

    Raises:
        ConfigError: for a built-in name that does not exist.
    """
    if not section.is_builtin:
        return Path(section.source), None
    name = section.source.removeprefix(BUILTIN)
    if name not in BUILTIN_MODELS:
        raise ConfigError(f"there is no `{section.source}`; built in are: {', '.join(BUILTIN_MODELS)}")
    folder, licence = BUILTIN_MODELS[name]
    return Path(str(files("dpo_assets") / folder)), licence


def builtin_licence(section: BaseModelSection) -> str | None:
    return local_source(section)[1] if section.is_builtin else None


def _identity(section: BaseModelSection) -> dict[str, object]:
    """What decides the artefact: for a folder also its files' sizes and times, so that edits are seen."""
    identity: dict[str, object] = section.model_dump()
    if section.chat_template is not None:
        template = Path(section.chat_template)
        if not template.is_file():
            raise ConfigError(f"base_model.chat_template: there is no file {template}")
        identity["template"] = template.read_text(encoding="utf-8")
    if not looks_like_hub_id(section.source):
        folder, _ = local_source(section)
        listed = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        identity["files"] = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in listed]
    return identity


def _copy(source: Path, target: Path) -> None:
    """Weights are hard-linked where the file system allows it (a 70B base is not copied), the rest is copied."""
    target.mkdir(parents=True)
    for path in sorted({p for pattern in KEPT for p in source.glob(pattern)}):
        if path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), target / path.name)
                continue
            except OSError:
                pass
        shutil.copyfile(path, target / path.name)


def _add_template(template: Path, model: Path) -> None:
    (model / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


def _download(api: HfApi, section: BaseModelSection, target: Path) -> None:
    """One pinned revision, without pickled weights."""
    from httpx import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        api.snapshot_download(section.source, revision=section.revision, local_dir=target, allow_patterns=list(KEPT))
    except RevisionNotFoundError:
        raise ConfigError(f"{section.source} has no revision {section.revision}; copy the sha from its page") from None
    except GatedRepoError:
        raise ConfigError(f"{section.source} is gated: accept its terms on the Hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"the Hub has no model {section.source}, or the token in HF_TOKEN may not see it") from None
    except (HfHubHTTPError, HTTPError) as error:
        raise InfrastructureError(f"{section.source} could not be downloaded: {scrub(str(error))}") from None
    shutil.rmtree(target / ".cache", ignore_errors=True)


NODE = Node(
    name="base_model",
    description="The starting model as a local folder: pinned, safetensors only, licence known.",
    phase="data",
    kinds=frozenset({"huggingface"}),
    body=materialise,
    recipe=("base_model",),
)
