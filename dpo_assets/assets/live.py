"""What the Hub hands out, held against what the ledger says is live; and the run in which that stays as it is."""

from __future__ import annotations

from dpo_assets.assets.step import Events, Step
from dpo_assets.checks.evidence.ledger import Ledger, Released, RolledBack
from dpo_assets.checks.verdict import Verdict
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.publishing.secrets import scrub
from dpo_assets.publishing.served import Served, served

CHECK = "release_verified"


def left_out(step: Step, held: str, ledger: Ledger) -> Events:
    """No release, and a check that says so: Dagster skips what reads this asset, and the run is green.

    Raises:
        GateError: what stays live by the ledger is not what the Hub hands out: a release or a rollback was stopped on
            its way, or somebody moved the tag. In a repository that the recipe left for another it is a warning: the
            next release goes to the other one.
    """
    live = ledger.live
    assert live is not None, "without a champion a hold is an error"
    now, fix = _served(step, live), "see the check promotion_verdict of `promotion`"
    moved = live.repo_id != step.recipe.publishing.repo_id
    if now.instead and not moved:
        said = f"nothing was released: {held}. But {now.instead}"
        band, source = f"main and tag `champion` at release {live.release}, {live.commit}", "docs/design.md, promotion"
        raise GateError(CHECK, said, value=said, band=band, source=source, fix=_send_again(step, live))
    if now.changed:
        fix = f"{', '.join(now.changed)} of it changed on main of {live.repo_id}. {_send_again(step, live)}; or {fix}"
    if now.unknown:
        fix = f"whether it is at {live.repo_id} is not known: {now.unknown}; {fix}"
    if moved:
        where = f"it was released to {live.repo_id}, and publishing.repo_id is {step.recipe.publishing.repo_id}"
        fix = f"{where}, which gets the next release; {f'{now.instead}; ' if now.instead else ''}{fix}"
    verdict = Verdict(
        CHECK,
        "warn",
        f"nothing was released: {held}",
        "a release where the challenger is promoted",
        "docs/design.md, promotion",
        scrub(fix),
    )
    step.context.log.warning(f"`published_model` is left out. {held}. {verdict.fix}")
    if any(check.name == verdict.check for check in step.context.selected_asset_check_keys):
        yield step.check_result("published_model", step.judged(verdict))


def not_served(step: Step, live: Released | RolledBack) -> str:
    """What speaks against the Hub holding what is live; empty where nothing does."""
    now = _served(step, live)
    if now.instead:
        return f"{now.instead}, and the ledger says release {live.release}, {live.commit}. {_send_again(step, live)}"
    if now.changed:
        return f"{live.repo_id} does not hold what was released as {live.commit}: {', '.join(now.changed)}"
    return f"whether release {live.release} is at {live.repo_id} is not known: {now.unknown}" if now.unknown else ""


def _served(step: Step, live: Released | RolledBack) -> Served:
    """What the Hub hands out in place of what the ledger says is live, where that was sent to."""
    try:
        hub = step.hub.repository(live.repo_id, step.pipeline.name)
    except ConfigError as error:  # No token.
        return Served(unknown=str(error))
    return served(hub, live.commit)


def _send_again(step: Step, live: Released | RolledBack) -> str:
    """The way out where the Hub does not hold what is live."""
    return (
        f"To send release {live.release} again, run the job {step.pipeline.name}_rollback with `to: "
        f'"{live.release}"` and a `reason`'
    )
