"""Why a release was not made."""

from __future__ import annotations

from dpo_assets.errors import ConfigError, DpoAssetsError, InfrastructureError


class PublishError(DpoAssetsError):
    """A release was not sent, or not finished."""


class PublishRefused(PublishError, ConfigError):
    """It must not or may not go there: token, repository or recipe have to change first. Not tried again."""


class HubOffline(PublishRefused):
    """The environment forbids the client to ask any Hub."""


class HubFailure(PublishError, InfrastructureError):
    """The Hub did not answer, or did not take what was sent. Worth another try."""


class Passing(HubFailure):
    """A refusal or a broken connection that a moment later may be gone; `after`: seconds that the Hub asks to wait."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class StaleHead(HubFailure):
    """Somebody else made a commit since the plan was made."""
