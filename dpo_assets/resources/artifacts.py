"""Where artefacts live."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

import dagster as dg
from filelock import FileLock
from pydantic import Field

from dpo_assets.artifact import ArtifactTree
from dpo_assets.errors import ConfigError

USER_KEY = "users.key"
KEY_BYTES = 32
# Where DAGSTER_HOME is not set, `dagster` and `dg` make a home of this name in the working directory, and remove it as
# they end.
TEMPORARY_HOME = ".tmp_dagster_home_"


class ArtifactStore(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A local folder of immutable artefact directories, one tree per pipeline."""

    root: str | None = Field(
        default=None, description="Folder of all artefacts; default: `dpo_assets` in the Dagster instance's storage."
    )

    def tree(
        self, instance: dg.DagsterInstance, pipeline: str, warn: Callable[[str], None] = lambda _: None, run: str = ""
    ) -> ArtifactTree:
        """The artefacts of one pipeline. `warn` is told of damaged ones, and of whom `run` waits for."""
        return ArtifactTree(self._folder(instance) / pipeline, warn, run)

    def refuse_passing(self, instance: dg.DagsterInstance) -> None:
        """Nothing is released from a folder that goes away when this process, or the `dagster dev` around it, ends.

        Raises:
            ConfigError: with the line to set.
        """
        folder, home = self._folder(instance), Path(instance.storage_directory()).absolute().parent
        passing = home.name.startswith(TEMPORARY_HOME)
        # An instance without a home keeps its storage in a folder of Python's `tempfile`.
        passing |= instance.is_ephemeral and home.parent == Path(tempfile.gettempdir()).absolute()
        if passing and folder.is_relative_to(home):
            raise ConfigError(
                f"publishing.dry_run is false, and DAGSTER_HOME is not set: {folder} is removed when Dagster ends, and "
                "with it the models, the ledger of releases and what is known of the champion: the next refresh would "
                'begin anew. Before Dagster is started: export DAGSTER_HOME="$HOME/dagster_home" && mkdir -p '
                '"$DAGSTER_HOME"; or set dry_run: true.'
            )

    def user_key(self, instance: dg.DagsterInstance) -> bytes:
        """The key of the digests that stand for users: made once for a store, kept beside it, for its owner to read.

        Raises:
            ConfigError: the file is not what was written.
        """
        path = self._folder(instance) / USER_KEY
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # Of two runs that start at once, one makes the key of both.
                if not path.exists():
                    self._make_key(path)
        written = path.read_text(encoding="ascii", errors="replace").strip()
        if not re.fullmatch(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", written):
            raise ConfigError(
                f"{path} does not hold the key that users are hashed with. Put it back from a backup, or delete it: "
                "users then get new digests, and all feedback is read again."
            )
        return bytes.fromhex(written)

    def _make_key(self, path: Path) -> None:
        fresh = path.with_name(f"{USER_KEY}.{secrets.token_hex(8)}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as handle:
            handle.write(secrets.token_hex(KEY_BYTES))
        fresh.replace(path)

    def _folder(self, instance: dg.DagsterInstance) -> Path:
        return (Path(self.root) if self.root else Path(instance.storage_directory()) / "dpo_assets").absolute()
