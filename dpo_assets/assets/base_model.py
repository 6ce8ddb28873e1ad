"""`base_model`: the starting model as a local folder with a digest."""

from __future__ import annotations

import json
import shutil
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import JsonValue

from dpo_assets.artifact import Artifact, read_kept, read_object, rewrite_json, write_json
from dpo_assets.assets.lineage import Inputs
from dpo_assets.assets.model_files import download, take_over, told_files
from dpo_assets.assets.node import Node
from dpo_assets.assets.step import Events, Step, final
from dpo_assets.checks.verdict import Verdict
from dpo_assets.contract import VERIFIED, TemplateSettings, VerifiedBase, VerifySpec
from dpo_assets.errors import ConfigError
from dpo_assets.planning.companions import (
    LEGACY_TEMPLATE,
    NAMED_TEMPLATES,
    PROCESSOR_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
)
from dpo_assets.planning.licence import Licence, licence_of
from dpo_assets.planning.model_folder import CONFIG, ModelFolder, inspect_model, uses_name
from dpo_assets.planning.shape import ModelShape
from dpo_assets.planning.text_part import has_other_parts
from dpo_assets.recipe import BUILTIN, BaseModelSection, PublishingSection, Recipe, looks_like_hub_id

BUILTIN_MODELS = {"stories260k": ("data/stories260k", "mit")}
FACTS = "model.json"
OF_THE_LICENCE = ("licence", "licence_name", "licence_link")
SAY_LICENCE = "set base_model.licence (for example apache-2.0, or `other` with licence_name) after reading its terms"


def materialise(step: Step) -> Events:
    """Fetches or copies the model; a model with pickled weights only is shown as a failed check, and not kept."""
    section = step.recipe.base_model
    sends = not step.recipe.publishing.dry_run
    refused: list[Verdict] = []

    def refuse(facts: ModelFolder) -> None:
        refused.extend(v for v in verdicts(section, facts, sends=sends) if v.level == "error")
        if refused:
            raise _Refused

    identity = _identity(section)

    def make(folder: Path, _: str) -> None:
        model = folder / "model"
        if looks_like_hub_id(section.source):
            left_out = download(step.hub.api(), section.source, section.revision, model, step.hub.token_variable)
        else:
            source, _licence = local_source(section)
            given = inspect_model(source)
            refuse(given)
            left_out = list(given.unused)
            take_over(source, model)
        if section.chat_template is not None:
            _set_template(Path(section.chat_template), model)
        facts = inspect_model(model)
        refuse(facts)
        _refuse_template(section, facts)
        stated = stated_licence(section, facts)
        described = facts.shape.model_dump() | {
            "architecture": facts.architecture,
            "licence": stated and stated.model_dump(),
        }
        template = section.model_dump(mode="json", include={"template_arguments", "template_date"})
        origin = {"source": _named(section), "revision": section.revision, "left_out": left_out}
        write_json(folder / FACTS, described | template | origin)

    try:
        artifact, reused = step.build("base_model", identity, step.inputs(), make)
    except _Refused:
        for verdict in refused:
            yield step.check_result("base_model", verdict)
        message = "; ".join(f"{v.headline}. {v.fix}" for v in refused)
        raise final(message) from None
    described, facts = read_facts(artifact), inspect_model(artifact.path / "model")
    licence = known_licence(step.recipe, artifact)
    verified = _verified(step, artifact) if needs_worker(section) and not step.only_checks else None
    yield from step.result(
        "base_model",
        artifact,
        reused,
        verdicts(section, facts, sends=sends),
        {
            "source": section.source,
            "revision": section.revision or "local",
            "licence": licence.shown if licence else "none known",
            "architecture": described.architecture,
            "parameters": described.parameters,
            **({"copies left out": ", ".join(described.left_out)} if described.left_out else {}),
            **_template_facts(section, facts),
            **(_verified_facts(verified) if verified else {}),
        },
    )


class BaseFacts(ModelShape):
    """What a base model is, as its artefact keeps it.

    `source` is a Hub id, a built-in name, or the name of a folder: where that folder lies makes no other model.

    `licence` is what the base itself states. What a recipe says of terms makes no other model, so it is no part of
    the artefact, and nothing is trained again for it: see `known_licence`.
    """

    licence: Licence | None
    source: str
    revision: str | None
    left_out: tuple[str, ...]
    template_arguments: dict[str, JsonValue]
    template_date: date


def read_facts(base: Artifact) -> BaseFacts:
    """What the artefact of a base says of it.

    Raises:
        ConfigError: it is one of an earlier version, which said less.
    """
    return read_kept(base, FACTS, BaseFacts)


def refuse_adapter_alone(publishing: PublishingSection, base: Artifact) -> None:
    """An adapter is of no use without a base that others can fetch, and put it on as it was trained.

    Raises:
        ConfigError: where `publishing.artifact` is `adapter`, and the base is a folder of this machine; or holds more
            than text: its class names the decoder's layers otherwise than the text part that was trained, so PEFT would
            load the adapter onto none of them, and onto layers of a tower that have the same last name.
    """
    if publishing.artifact != "adapter":
        return
    if not read_facts(base).revision:
        raise ConfigError(
            "publishing.artifact `adapter` needs a base from the Hub: an adapter is of no use without one that others "
            "can fetch. Release `merged` instead."
        )
    config = json.loads((base.path / "model" / CONFIG).read_text(encoding="utf-8"))
    if has_other_parts(config):
        raise ConfigError(
            f"publishing.artifact `adapter` needs a base of text alone. {read_facts(base).architecture} holds "
            "more and names its layers otherwise than the language model that is trained: loaded onto it, the "
            "adapter would change nothing. Release `merged` instead."
        )


def known_licence(recipe: Recipe, base: Artifact) -> Licence | None:
    """The licence of a base that counts now: the recipe may name one after the base was made."""
    return licence_of(recipe.base_model, read_facts(base).licence)


def refuse_unlicensed(recipe: Recipe, base: Artifact) -> None:
    """A release hands on what its base allows, so that has to be known.

    Raises:
        ConfigError: where a release would be sent, and neither recipe nor base states a licence.
    """
    if not recipe.publishing.dry_run and known_licence(recipe, base) is None:
        raise ConfigError(f"publishing.dry_run is false, and no licence is known of the base: {SAY_LICENCE}.")


def needs_worker(section: BaseModelSection) -> bool:
    """Whether the worker verifies the base: a built-in one is verified by the tests, with its own template."""
    return not section.is_builtin or section.chat_template is not None


def in_worker(base: Artifact) -> dict[str, Any]:
    """What every spec is told of the base: its folder, and how its chat template is rendered."""
    facts = read_facts(base)
    template = TemplateSettings(arguments=facts.template_arguments, day=facts.template_date)
    return {"base_model": base.path / "model", "template": template}


def _verified(step: Step, base: Artifact) -> VerifiedBase:
    """What the worker says of the base, which it loads without its values: the tensors that config.json needs are known
    to the training library alone.

    Raises:
        ConfigError: when the base is not whole, or would be read otherwise than it is written.
    """
    inputs = Inputs.of("base_model", {"base_model": base})

    def make(folder: Path, print_: str) -> None:
        step.launch(
            "verify",
            VerifySpec(
                kind="verified_base",
                output_dir=folder,
                fingerprint=print_,
                inputs=inputs.digests,
                threads=step.recipe.hardware.threads,
                **in_worker(base),
            ),
        )

    verified, _ = step.build("verified_base", {}, inputs, make)
    return read_kept(verified, VERIFIED, VerifiedBase)


def _verified_facts(verified: VerifiedBase) -> dict[str, Any]:
    unused = verified.unused_tensors
    return {
        "a turn ends at": ", ".join(verified.ends),
        "tensors beside the language model: kept, not trained": len(unused),
        **({"kept, not trained": dg.MetadataValue.json(list(unused))} if unused else {}),
    }


def _template_facts(section: BaseModelSection, facts: ModelFolder) -> dict[str, Any]:
    """What decides the text of every prompt beside the template."""
    shown: dict[str, Any] = {}
    if section.template_arguments:
        shown["template arguments"] = dg.MetadataValue.json(section.template_arguments)
    if facts.prints_date:
        shown["template date"] = section.template_date.isoformat()
    return shown


def _refuse_template(section: BaseModelSection, facts: ModelFolder) -> None:
    if not facts.chat_template:
        raise ConfigError(
            f"{section.source} has no chat template; set `base_model.chat_template` to a Jinja file, or start from "
            "an instruct model."
        )
    if unknown := [name for name in section.template_arguments if not uses_name(facts.chat_template, name)]:
        raise ConfigError(
            f"base_model.template_arguments: the chat template of {section.source} has no use for "
            f"{', '.join(unknown)}; its own names are in its Jinja text"
        )


class _Refused(Exception):
    """The folder fails a gate, so there is nothing to keep."""


def verdicts(section: BaseModelSection, facts: ModelFolder, *, sends: bool) -> list[Verdict]:
    """The gates of a starting model. Only what is sent needs a licence: in a dry run its lack is a warning."""
    pinned = not looks_like_hub_id(section.source) or section.revision is not None
    licence = licence_of(section, stated_licence(section, facts))
    unlisted = licence.unlisted if licence else ""
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
            "warn" if unlisted else "pass" if licence else "error" if sends else "warn",
            f"{licence.shown}, by the {licence.stated_by}" if licence else "none stated",
            "an id of the Hub's list in the recipe or the model card, or a licence file",
            "a release inherits the licence of its base",
            f"{unlisted}: {SAY_LICENCE}" if unlisted else "" if licence else SAY_LICENCE,
        ),
    ]


def stated_licence(section: BaseModelSection, facts: ModelFolder) -> Licence | None:
    """What the base itself states: its folder, or this package of a model of its own."""
    packaged = local_source(section)[1] if section.is_builtin else None
    return facts.licence or (Licence(identifier=packaged, stated_by="package") if packaged else None)


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


def _named(section: BaseModelSection) -> str:
    """The source as the artefact keeps it: a path would publish somebody's file system, and make all anew elsewhere."""
    is_name = section.is_builtin or looks_like_hub_id(section.source)
    return section.source if is_name else Path(section.source).name


def _identity(section: BaseModelSection) -> dict[str, object]:
    """What decides the artefact: for a folder also its files' sizes and times, so that edits are seen.

    Not what the recipe says of the licence, nor where the file of a template lies.
    """
    identity: dict[str, object] = section.model_dump(exclude={*OF_THE_LICENCE, "chat_template"})
    if section.chat_template is not None:
        template = Path(section.chat_template)
        if not template.is_file():
            raise ConfigError(f"base_model.chat_template: there is no file {template}")
        identity["template"] = template.read_text(encoding="utf-8")
    if not looks_like_hub_id(section.source):
        identity["held"] = "as copies"  # Earlier versions linked weights, which a change of the source reached.
        identity["files"] = told_files(local_source(section)[0])
    return identity


def _set_template(template: Path, model: Path) -> None:
    """The recipe's template in place of any that the model has, wherever it keeps it."""
    (model / TEMPLATE).write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    # The processor of an older model would go on with its own copy of the template.
    (model / LEGACY_TEMPLATE).unlink(missing_ok=True)
    # One by the name of `tool_use` would be taken for every pair with tools.
    shutil.rmtree(model / NAMED_TEMPLATES, ignore_errors=True)
    for name in (TOKENIZER_CONFIG, PROCESSOR_CONFIG):
        config = read_object(model / name) if (model / name).is_file() else {}
        if config.pop("chat_template", None) is not None:
            rewrite_json(model / name, config)


NODE = Node(
    name="base_model",
    description="The starting model as a local folder: pinned, safetensors only, licence known.",
    phase="data",
    kinds=frozenset({"huggingface"}),
    body=materialise,
    recipe=("base_model",),
)
