"""The Hugging Face Hub, by its own client. The token stays in the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from dpo_assets.errors import ConfigError
from dpo_assets.publishing.hub import HubRepository, Patience
from dpo_assets.publishing.secrets import name_secrets
from dpo_assets.recipe import holds_more_than_a_place

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class HubResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A client made on use, so that no token is ever part of run config or definitions."""

    endpoint: str | None = Field(default=None, description="Hub address; default: huggingface_hub's own.")
    token_variable: str = Field(default="HF_TOKEN", description="Environment variable that holds the token.")
    timeout_seconds: float = Field(
        default=60.0,
        gt=0.0,
        description="How long a publication waits for an answer of the Hub, and for a part of a file to go through.",
    )

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Makes the token known as a secret, so that it is masked wherever it turns up."""
        name_secrets(self.token_variable)

    def token(self) -> str | None:
        """The token, or None."""
        name_secrets(self.token_variable)
        return os.environ.get(self.token_variable) or None

    def api(self) -> HfApi:
        """The real client.

        Raises:
            ConfigError: its address holds what may be a secret.
        """
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token=self.token() or False)
        if holds_more_than_a_place(api.endpoint):
            raise ConfigError(
                "the Hub's address (publishing.endpoint, or HF_ENDPOINT of the environment) holds a user, a "
                "password, a query or a fragment, and the card of a release shows it; write scheme, host and path "
                f"alone. The token is read from {self.token_variable}."
            )
        return api

    def patience(self) -> Patience:
        """How long a publication waits."""
        return Patience(seconds=self.timeout_seconds)

    def repository(self, repo_id: str, pipeline: str) -> HubRepository:
        """A repository to publish in, for a pipeline.

        Raises:
            ConfigError: the environment holds no token.
        """
        if self.token() is None:
            raise ConfigError(
                f"publishing.dry_run is false, but {self.token_variable} is not set in the environment; set it, or set "
                "dry_run: true."
            )
        return HubRepository(self.api(), repo_id, self.token_variable, self.patience(), pipeline)
