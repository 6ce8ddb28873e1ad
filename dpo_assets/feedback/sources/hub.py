"""Hub datasets at a pinned revision: their data files, downloaded as they are and read like any other file."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dpo_assets.errors import ConfigError, FeedbackError, InfrastructureError
from dpo_assets.feedback.sources.files import DATA_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HubAccess = Callable[[], "HfApi"]
# Files of a repository that hold no rows, whatever their names end in.
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?:[/_.-]|\d|$)", re.IGNORECASE)
_NOTE = "files.json"
_MOST_NAMED = 8


def fetch(
    repo: str, revision: str, patterns: Sequence[str], landing: Path, access: HubAccess | None
) -> list[tuple[Path, str]]:
    """(local file, path in the repository) of every data file that is asked for; from the Hub only once.

    Raises:
        ConfigError: when repository or revision do not exist or may not be seen; a FeedbackError when no file fits.
        InfrastructureError: when the Hub does not answer.
    """
    from filelock import FileLock

    folder = landing / "hub" / repo.replace("/", "--") / revision
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # The note of what was chosen is read, added to and written.
        chosen = _kept(folder, patterns)
        if chosen is None:
            chosen = _download(repo, revision, patterns, folder, access)
    return [(folder / "files" / path, path) for path in chosen]


def choose(repo: str, listed: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The data files that `patterns` name; without patterns all, where all are of one split and one kind.

    Raises:
        FeedbackError: with the files that there are.
    """
    data = sorted(p for p in listed if DATA_NAME.search(p) and PurePosixPath(p).name not in _NO_DATA and ".." not in p)
    some = ", ".join(data[:_MOST_NAMED]) + (f" and {len(data) - _MOST_NAMED} more" if len(data) > _MOST_NAMED else "")
    if not data:
        kinds = ", ".join(sorted({PurePosixPath(p).suffix for p in listed if PurePosixPath(p).suffix})) or "none"
        raise FeedbackError(f"the dataset {repo} has no JSON, CSV or Parquet file (its files end in: {kinds}).")
    if patterns:
        chosen = [p for p in data if any(fnmatch.fnmatchcase(p, pattern) for pattern in patterns)]
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(p, pattern) for p in data):
                raise FeedbackError(f"the dataset {repo} has no data file `{pattern}`; it has: {some}.")
        return chosen
    splits = {(found[1].lower() if (found := _SPLIT.search(p)) else "") for p in data}
    kinds_of = {PurePosixPath(p).suffix.lower() for p in data}
    folders = {str(PurePosixPath(p).parent) for p in data}
    if len(splits) > 1 or len(kinds_of) > 1 or len(folders) > 1:
        raise FeedbackError(
            f"the dataset {repo} has several splits, configs or kinds of file, and a test split is not for training: "
            f"choose with `files`, a pattern or several. It has: {some}."
        )
    return data


def _kept(folder: Path, patterns: Sequence[str]) -> list[str] | None:
    """The files that an earlier call chose by the same patterns, if they are all still here."""
    try:
        note = json.loads((folder / _NOTE).read_text("utf-8"))
        files = note[json.dumps(sorted(patterns))]
        whole = all((folder / "files" / path).stat().st_size == size for path, size in files.items())
    except (OSError, ValueError, KeyError):
        return None
    return sorted(files) if whole else None


def _download(repo: str, revision: str, patterns: Sequence[str], folder: Path, access: HubAccess | None) -> list[str]:
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = access() if access is not None else HfApi(token=False)
    try:
        listed = api.list_repo_files(repo, repo_type="dataset", revision=revision)
        chosen = choose(repo, listed, patterns)
        api.snapshot_download(
            repo,
            repo_type="dataset",
            revision=revision,
            local_dir=folder / "files",
            allow_patterns=[_exactly(p) for p in chosen],
        )
    except RevisionNotFoundError:
        raise ConfigError(f"the dataset {repo} has no revision {revision}; copy the sha from its page") from None
    except GatedRepoError:
        raise ConfigError(f"the dataset {repo} is gated: accept its terms on the Hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"the Hub has no dataset {repo}, or the token in HF_TOKEN may not see it") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError) as error:
        raise InfrastructureError(f"the dataset {repo} could not be downloaded: {type(error).__name__}") from None
    missing = [path for path in chosen if not (folder / "files" / path).is_file()]
    if missing:
        raise InfrastructureError(f"the dataset {repo} came without {missing[0]}; try again")
    _note(folder, patterns, chosen)
    return chosen


def _exactly(path: str) -> str:
    """A pattern that only this path fits."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _note(folder: Path, patterns: Sequence[str], chosen: Sequence[str]) -> None:
    target = folder / _NOTE
    try:
        note = json.loads(target.read_text("utf-8"))
    except (OSError, ValueError):
        note = {}
    note[json.dumps(sorted(patterns))] = {path: (folder / "files" / path).stat().st_size for path in chosen}
    part = target.with_suffix(".part")
    part.write_text(json.dumps(note, indent=1), "utf-8")
    os.replace(part, target)
