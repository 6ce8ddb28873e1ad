"""The files of a model, from a folder or the Hub into an artefact: the weights once, and what belongs beside them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.disk import copy_file, refuse_too_small
from dpo_assets.errors import ConfigError, InfrastructureError
from dpo_assets.planning.companions import copy_files, found, is_kept
from dpo_assets.planning.weights import INDEX, SINGLE, weight_files
from dpo_assets.publishing.secrets import scrub

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def told_files(folder: Path) -> list[list[object]]:
    """Name, size and time of every file of a folder: what tells an edit without reading the weights."""
    listed = found(folder, lambda _: True) if folder.is_dir() else []
    told = [(name, (folder / name).stat()) for name in listed]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in told]


def take_over(source: Path, target: Path) -> None:
    """Files of its own: neither a change of the source, which may be a blob of the Hub's cache, reaches them, nor the
    other way round. Where the file system has reflinks they take no room either.

    Raises:
        DiskFull: there is no room for them.
        InfrastructureError: the source changed meanwhile. Worth another try.
    """
    before = told_files(source)
    target.mkdir(parents=True)
    weights = weight_files(source)
    refuse_too_small(target, sum(path.stat().st_size for path in weights), f"a copy of {source}")
    for path in weights:
        copy_file(path, target / path.name)
    # Beside a single file, which is what is loaded, the index is that of copies left behind.
    single = (target / SINGLE).is_file()
    copy_files(source, target, lambda name: is_kept(name) and not (single and name == INDEX))
    if told_files(source) != before:
        raise InfrastructureError(f"{source} changed while it was copied")


def download(api: HfApi, source: str, revision: str | None, target: Path, token_variable: str) -> list[str]:
    """One pinned revision: what `is_kept` names, and the weights that a model is loaded from, once.

    Repositories also hold pickled weights, and second copies in layouts of other libraries.

    Returns:
        the safetensors files that were left behind.

    Raises:
        ConfigError: there is no such model or revision, or it may not be seen.
        InfrastructureError: the Hub did not answer.
    """
    with _told_by_the_hub(source, revision, token_variable):
        there = _download_companions(api, source, revision, target)
        weights = _loaded_weights(source, there, target)
        if weights:
            _fetch(api, source, revision, target, weights)
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return sorted(name for name in there if name.endswith(".safetensors") and name not in weights)


def look_at(api: HfApi, source: str, revision: str | None, target: Path, token_variable: str) -> list[str]:
    """One pinned revision without its weights: what `is_kept` names.

    Returns:
        the safetensors files that a model would be loaded from; empty: there are none.

    Raises:
        ConfigError: as `download`.
        InfrastructureError: the Hub did not answer.
    """
    with _told_by_the_hub(source, revision, token_variable):
        return _loaded_weights(source, _download_companions(api, source, revision, target), target)


def _download_companions(api: HfApi, source: str, revision: str | None, target: Path) -> set[str]:
    """All files that go with the weights. Returns the names at the root of the repository."""
    listed = api.list_repo_files(source, revision=revision)
    _fetch(api, source, revision, target, [name for name in listed if is_kept(name)])
    return {name for name in listed if "/" not in name}


def _loaded_weights(source: str, there: Collection[str], target: Path) -> list[str]:
    """The files that a model is loaded from: the single one, or those that the index names."""
    if SINGLE in there:
        (target / INDEX).unlink(missing_ok=True)  # Of the copy in parts, which stays behind.
        return [SINGLE]
    weights = [path.name for path in weight_files(target)] if (target / INDEX).is_file() else []
    if missing := [name for name in weights if name not in there]:
        raise ConfigError(f"{source}: {INDEX} names {', '.join(missing)}, but the repository lacks it")
    return weights


def _fetch(api: HfApi, source: str, revision: str | None, target: Path, names: Sequence[str]) -> None:
    # As they are called: `[` in a name is none of a pattern.
    api.snapshot_download(source, revision=revision, local_dir=target, allow_patterns=[escape(name) for name in names])


@contextmanager
def _told_by_the_hub(source: str, revision: str | None, token_variable: str) -> Iterator[None]:
    """What the client raises, in the words of a recipe."""
    from httpx import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError:
        raise ConfigError(f"{source} has no revision {revision}; copy the sha from its page") from None
    except GatedRepoError:
        raise ConfigError(f"{source} is gated: accept its terms on the Hub and set {token_variable}") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"the Hub has no model {source}, or the token in {token_variable} may not see it") from None
    except (HfHubHTTPError, HTTPError) as error:
        raise InfrastructureError(f"{source} could not be downloaded: {scrub(str(error))}") from None
