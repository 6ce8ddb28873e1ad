"""`published_model`: a release on the Hub, or the same folder and operation list as a dry run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from dpo_assets.artifact import Artifact, read_kept, read_object, rewrite_json, write_json
from dpo_assets.assets.base_model import known_licence, read_facts, refuse_adapter_alone, refuse_unlicensed
from dpo_assets.assets.dpo_plan import followed, read_plan
from dpo_assets.assets.lineage import Inputs, Read
from dpo_assets.assets.live import CHECK, left_out, not_served
from dpo_assets.assets.node import Node
from dpo_assets.assets.promotion import SNAPSHOT, read_ledger
from dpo_assets.assets.publication import RELEASE, Publication
from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.checks.evidence.spending import ALPHA
from dpo_assets.checks.promotion import PromotionOutcome
from dpo_assets.checks.reports import DpoReport, EvaluationReport, MergeReport
from dpo_assets.checks.verdict import Level, Verdict
from dpo_assets.errors import ConfigError
from dpo_assets.hashing import known_sha256
from dpo_assets.planning.companions import CARD, copy_files, found, is_licence_file, is_released
from dpo_assets.planning.model_card import split_card
from dpo_assets.planning.model_folder import ADAPTER, CONFIG
from dpo_assets.planning.text_part import has_other_parts
from dpo_assets.publishing.card import CardFacts, Standing, card_settings, render_card
from dpo_assets.publishing.commit import Release, stage, staged_files
from dpo_assets.publishing.plan import MADE_BY, FileRecord, ReleasePlan, ReleaseRecord
from dpo_assets.publishing.trace import Trace
from dpo_assets.report.tables import table

FILES = "files.json"
SHOWN = 50  # Files of others that the page of the asset names.


def materialise(step: Step) -> Events:
    """Stages the release, plans it against the repository, and sends it when the recipe says so and it is promoted.

    What is held while a champion is live is left out: nothing is made, and the champion stays.
    """
    if step.recipe.publishing.dry_run or step.only_checks:
        yield from _materialised(step, sends=False)
        return
    with LedgerFile.of(step.tree.root).going_live(step.context.run_id, step.context.log.warning):
        yield from _materialised(step, sends=True)


def _materialised(step: Step, *, sends: bool) -> Events:
    publishing = step.recipe.publishing
    refuse_overtaken(step)
    sends = not publishing.dry_run and not step.only_checks
    if sends:
        step.store.refuse_passing(step.context.instance)
    inputs, ledger = step.inputs(), read_ledger(step.tree)
    outcome = PromotionOutcome.of(inputs["promotion"])
    if sends:
        refuse_unlicensed(step.recipe, inputs["base_model"])
        if (held := held_back(outcome, ledger)) is not None:
            yield from left_out(step, held, ledger)
            return

    standing = standing_of(step, inputs, outcome)

    def make(folder: Path, _: str) -> None:
        target = folder / RELEASE
        target.mkdir()
        facts = _facts(step, inputs, standing)
        merged = publishing.artifact == "merged"
        source = inputs["merged_model"].path / "model" if merged else _adapter(step, inputs, folder)
        name = step.pipeline.name
        provenance = {
            "pipeline": name,
            "inputs": inputs.digests,
            "versions": facts.versions,
            "ledger": outcome.decided.digest,
        }
        files = stage(source, target, render_card(facts), provenance)
        write_json(folder / FILES, ReleaseRecord(made_by=MADE_BY, pipeline=name, files=files).model_dump())

    licence = known_licence(step.recipe, inputs["base_model"])
    config = {
        "artifact": publishing.artifact,
        "title": _title(step),
        "repo_id": publishing.repo_id,
        "record": sorted(ReleaseRecord.model_fields),
        "checks": _levels(step, inputs),
        "licence": licence and licence.model_dump(),
        "hub": step.hub.api().endpoint,
        "standing": asdict(standing),
    }
    artifact, reused = step.build("published_model", config, inputs, make)
    publication = Publication(step, artifact, read_kept(artifact, FILES, ReleaseRecord).files)
    release = publication.send() if sends else None
    if release:
        ledger = went_live(step, artifact, outcome, release)
    plan, refused = (release.plan, "") if release else publication.plan()
    known = "" if release else _of_the_hub(step, plan, refused)
    if not (release or refused):
        refused = _what_speaks_against(step, artifact, plan, ledger)
    yield from step.result(
        "published_model",
        artifact,
        reused,
        [verify(artifact, publication.files, release, refused, known)],
        {
            "release": dg.MetadataValue.path(str(artifact.path / RELEASE)),
            "dry_run": publishing.dry_run,
            "repository": publishing.repo_id or "none set",
            **(
                {
                    "url": dg.MetadataValue.url(release.url),
                    "commit": release.commit,
                    "champion": release.champion,
                    "release_number": ledger.number_of(outcome.decided),
                    "tag": release.tag,
                    "sent": release.sent,
                }
                if release
                else {}
            ),
            **_shown(plan, publication),
            "card": dg.MetadataValue.md(split_card((artifact.path / RELEASE / CARD).read_text(encoding="utf-8"))[1]),
        },
    )


def _shown(plan: ReleasePlan, publication: Publication) -> dict[str, Any]:
    """The operations, what they were made against, and what stays beside the release."""
    rows = [[o.action, o.path, o.size, o.sha256[:12]] for o in plan.operations]
    kept = [[path] for path in plan.kept[:SHOWN]]
    if (more := len(plan.kept) - SHOWN) > 0:
        kept.append([f"and {more} more"])
    return {
        "planned_on": plan.head or plan.note,
        "operations": dg.MetadataValue.md(table(["action", "file", "bytes", "sha256"], rows)),
        "operations_file": dg.MetadataValue.path(str(publication.operations_file)),
        **({"files_of_others": dg.MetadataValue.md(table(["stays as it is"], kept))} if kept else {}),
    }


def _of_the_hub(step: Step, plan: ReleasePlan, refused: str) -> str:
    """What a run that sent nothing saw of the Hub."""
    if refused:
        return "and it would be refused"
    if not plan.asked:
        return "the Hub not asked"
    return "" if plan.changes else f"{step.recipe.publishing.repo_id} holds them"


def _what_speaks_against(step: Step, artifact: Artifact, plan: ReleasePlan, ledger: Ledger) -> str:
    """What was seen on the Hub and is no good, beside a refusal; empty where there is nothing.

    It counts until the Hub is asked again: a look at the local folder alone mends nothing.
    """
    if not plan.asked:
        passed = (step.levels(artifact) or {}).get(CHECK, "pass") == "pass"
        return "" if passed else f"it failed this check when the Hub was asked, and now {plan.note}"
    # By the ledger, not by what was materialised last: after a rollback an earlier release is live.
    return not_served(step, ledger.live) if step.only_checks and ledger.live is not None else ""


def verify(
    artifact: Artifact, files: Mapping[str, FileRecord], release: Release | None, refused: str = "", known: str = ""
) -> Verdict:
    """The staged folder holds what was listed. What is on the Hub, `publish` compares, and fails this check.

    Args:
        refused: why a release would be refused, or what speaks against the one that was sent: a warning.
        known: what a run that sent nothing saw of the Hub.
    """
    folder = artifact.path / RELEASE
    wrong = [p for p, f in files.items() if not (folder / p).is_file() or known_sha256(folder / p) != f.sha256]
    extra = set(staged_files(folder)) - set(files)
    bad = [*wrong, *sorted(extra)]
    return Verdict(
        CHECK,
        "error" if bad else "warn" if refused else "pass",
        ", ".join(filter(None, (f"{len(files)} files", _outcome(release), known))),
        "every file as listed, no secret in any text",
        "docs/design.md, publishing",
        f"these files differ: {', '.join(bad)}" if bad else refused,
    )


def _outcome(release: Release | None) -> str:
    """What this run did about a release, and no more than that."""
    if release is None:
        return "nothing sent"
    sent = f"commit {release.commit[:12]}" + (", sent" if release.sent else " was there already, nothing sent")
    proof = "read back and equal" if release.read_back else "equal by the Hub's digests, read back when it was tagged"
    return f"{sent}, {proof}"


def held_back(outcome: PromotionOutcome, ledger: Ledger) -> str | None:
    """Why a challenger is left out while the champion stays live; None: it is released.

    Raises:
        ConfigError: the decision is a preview, or of another state of the ledger; or nothing is live, so that a release
            was asked for and cannot be.
    """
    decided = outcome.decided
    if outcome.preview:
        raise ConfigError(
            "publishing.dry_run is false, and the decision is the preview of a dry run; materialise `promotion` again."
        )
    if ledger.may_release(decided):
        return None
    if decided.releases:
        raise ConfigError(
            f"the decision to {decided.decision}, line {decided.number} of the ledger, does not count any more: the "
            "challenger was decided on again, or something else went live; materialise `promotion` again."
        )
    if ledger.live is None:
        raise ConfigError(
            f"publishing.dry_run is false, and nothing carries a release: {decided.decision}: {decided.reason}. "
            "Collect more pairs, or decide with `override` and a `reason` in the launchpad of `promotion`."
        )
    return f"{decided.decision}: {decided.reason}; release {ledger.live.release} stays live"


def refuse_overtaken(step: Step) -> None:
    """A run that is no longer the newest releases nothing, and stages nothing that would stand for the latest.

    Raises:
        ConfigError: another run has made what this one would release, since.
    """
    for node in ("merged_model", "promotion"):
        if not step.only_checks and (other := step.overtaken_by(node)) is not None:
            raise ConfigError(
                f"this run was overtaken: run {other} has materialised another `{node}` since. Nothing was released, "
                "and what is live is as it was; the release is that run's, or that of the next refresh."
            )


def went_live(step: Step, artifact: Artifact, outcome: PromotionOutcome, release: Release) -> Ledger:
    """The ledger, in which this release, verified on the Hub, is the champion from here on.

    Raises:
        ConfigError: while it was sent, something else went live.
    """
    repo_id = step.recipe.publishing.repo_id
    assert repo_id is not None, "the recipe requires repo_id when dry_run is false"

    def add(ledger: Ledger) -> Ledger:
        if not ledger.may_release(outcome.decided):
            raise ConfigError(
                f"while {repo_id}@{release.commit} was sent, another model of this pipeline went live or this one was "
                "decided on again. The ledger is as it was; materialise `promotion` and `published_model` again."
            )
        return ledger.released(
            outcome.decided,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            repo_id=repo_id,
            commit=release.champion,
            tag=release.tag,
            artefact=artifact.fingerprint,
            known=outcome.held_out,
        )

    return LedgerFile.of(step.tree.root).extend(add)


def _title(step: Step) -> str:
    return (step.recipe.publishing.repo_id or step.pipeline.name).split("/")[-1]


def standing_of(step: Step, inputs: Inputs, outcome: PromotionOutcome) -> Standing:
    """Where the release of a decision stands: by the ledger as it was when that was taken."""
    decided = outcome.decided
    then = Ledger.of_text((inputs["promotion"].path / SNAPSHOT).read_text(encoding="utf-8"))
    before = Ledger(lines=then.lines[: decided.number - 1])
    live = before.live
    after = before.append(decided)
    return Standing(
        pipeline=step.pipeline.name,
        number=after.number_of(decided),
        preview=outcome.preview,
        replaces=f"release {live.release} ({live.tag}, commit {live.commit[:12]})" if live is not None else "",
        level=decided.level,
        spent=after.budget().spent,
        alpha=ALPHA,
        override=decided.override.reason if decided.override is not None else "",
        withdrawn=Trace.of(step.tree.root).withdrawn(live.artefact, inputs.digests) if live is not None else None,
    )


def _facts(step: Step, inputs: Inputs, standing: Standing) -> CardFacts:
    base, scores = read_facts(inputs["base_model"]), EvaluationReport.of(inputs["eval_scores"])
    outcome = PromotionOutcome.of(inputs["promotion"])
    return CardFacts(
        title=_title(step),
        repo_id=step.recipe.publishing.repo_id,
        hub=step.hub.api().endpoint,
        # An artefact of an earlier version holds a local folder's path, which would publish the author's file system.
        base_source=base.source if base.revision or base.source.startswith("builtin:") else Path(base.source).name,
        base_revision=base.revision,
        licence=known_licence(step.recipe, inputs["base_model"]),
        licence_files=tuple(found(inputs["base_model"].path / "model", is_licence_file)),
        artifact=step.recipe.publishing.artifact,
        plan=read_plan(inputs["dpo_plan"]),
        dataset=inputs["dpo_dataset"].json("report.json"),
        dataset_digest=inputs["dpo_dataset"].digest,
        training=DpoReport.of(inputs["dpo_adapter"]),
        merge=MergeReport.of(inputs["merged_model"]),
        scores=scores,
        decision=outcome.decided.decision,
        reason=outcome.decided.reason,
        standing=standing,
        checks=_levels(step, inputs),
        versions=inputs["dpo_adapter"].manifest.versions,
        beyond_text=has_other_parts(inputs["base_model"].json(f"model/{CONFIG}")),
        template_arguments=base.template_arguments,
    )


def _levels(step: Step, inputs: Inputs) -> dict[str, dict[str, Level]]:
    """The outcomes of the checks of what the release is made from, by asset.

    Whether a plan fits is left out: the same release may be made on a card with less memory.
    """
    return {
        node: {check: level for check, level in (step.levels(artifact) or {}).items() if check != "memory_fits"}
        for node, artifact in inputs.items()
    }


def _adapter(step: Step, inputs: Inputs, folder: Path) -> Path:
    refuse_adapter_alone(step.recipe.publishing, inputs["base_model"])
    patched = folder / "adapter"
    patched.mkdir()
    base = read_facts(inputs["base_model"])
    merged = inputs["merged_model"].path / "model"
    write_adapter(inputs["dpo_adapter"].path / "adapter", merged, patched, base.source, base.revision)
    return patched


def write_adapter(source: Path, merged: Path, folder: Path, base: str, revision: str | None) -> None:
    """The adapter with the Hub id of its base in place of a local path, and with what the merged model has beside its
    weights: an adapter is asked through the tokenizer, template and turn ends that it was trained with."""
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    copy_files(merged, folder, is_released)
    config = read_object(source / ADAPTER)
    config["base_model_name_or_path"], config["revision"] = base, revision
    rewrite_json(folder / ADAPTER, config)


NODE = Node(
    name="published_model",
    description="The release: folder, card and operations as a dry run, or one verified commit and tag on the Hub.",
    phase="release",
    kinds=frozenset({"huggingface"}),
    body=materialise,
    reads=(
        followed(card_settings),
        Read("promotion"),
        Read("eval_scores"),
        Read("merged_model"),
        Read("dpo_adapter"),
        Read("dpo_dataset"),
        Read("base_model"),
    ),
    recipe=("publishing", "base_model"),
)
