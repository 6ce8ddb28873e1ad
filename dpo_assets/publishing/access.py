"""Whether a release could be sent, asked before anything is trained for it. Nothing is written."""

from __future__ import annotations

from typing import Any

import yaml

from dpo_assets.planning.licence import Licence
from dpo_assets.publishing.commit import champion_commit
from dpo_assets.publishing.errors import PublishRefused
from dpo_assets.publishing.hub import HubRepository
from dpo_assets.publishing.plan import refuse_foreign, refuse_public


def check_access(hub: HubRepository, *, private: bool, adopt: str | None, licence: Licence | None) -> str:
    """Holds token, repository and licence against what the recipe wants, and says in a line what is known now.

    Raises:
        PublishRefused: the token is unknown or expired, may only read, or may not write there; the repository is public
            and must not be, or holds files of others, or a tag `champion` of theirs; the Hub lists no such licence, and
            so takes no card with it.
        HubFailure: the Hub did not answer, so that nothing is known.
    """
    account = hub.account()
    name, role = str(account.get("name", "")), _role(account)
    if role == "read":
        raise PublishRefused(
            f"the token in {hub.token_variable} may only read, and publishing.dry_run is false. Give it write access "
            f"to {hub.repo_id}, or set dry_run: true"
        )
    if licence is not None:
        _refuse_unlisted(licence, hub)
    head = hub.head()
    if head is None:
        _refuse_other_namespace(account, name, role, hub)
        return f"{name} makes {hub.repo_id}, which does not exist yet"
    refuse_public(head, hub.repo_id, private)
    refuse_foreign(head, hub.repo_id, adopt)
    champion_commit(hub, head, adopt)
    hub.refuse_without_right_to_write()
    return f"{name} may write to {hub.repo_id}, which is {'private' if head.private else 'public'}"


def _refuse_unlisted(licence: Licence, hub: HubRepository) -> None:
    """The Hub's list grows, so the Hub is asked, as it is again for the card of the commit."""
    try:
        hub.refuse_unreadable_card(f"---\n{yaml.safe_dump({'license': licence.identifier})}---\n")
    except PublishRefused as error:
        raise PublishRefused(
            f"{error} The licence `{licence.identifier}` is stated by the {licence.stated_by}: name one that the Hub "
            "lists in base_model.licence, or `other` with licence_name and licence_link"
        ) from None


def _role(account: dict[str, Any]) -> str:
    """`read`, `write` or `fineGrained`; empty where the Hub does not say."""
    return str(((account.get("auth") or {}).get("accessToken") or {}).get("role") or "")


def _refuse_other_namespace(account: dict[str, Any], name: str, role: str, hub: HubRepository) -> None:
    """A token that writes may make repositories of its user and of the user's organisations.

    What a fine-grained token may make is not told; making it will tell.
    """
    orgs = account.get("orgs")
    if role != "write" or not isinstance(orgs, list):
        return
    own = [name, *(str(org.get("name")) for org in orgs if isinstance(org, dict))]
    namespace = hub.repo_id.split("/")[0]
    if namespace not in own:
        raise PublishRefused(
            f"{hub.repo_id} does not exist, and {name}, whose token is in {hub.token_variable}, can make repositories "
            f"of {', '.join(own)} only. Name one of theirs in publishing.repo_id, or ask {namespace} to make it"
        )
