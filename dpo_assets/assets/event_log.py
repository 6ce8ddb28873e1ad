"""What an asset writes into Dagster's event log, where it stays for ever: no secret may be in it."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import dagster as dg

from dpo_assets.publishing.secrets import scrub, scrub_all

Event = dg.MaterializeResult[Any] | dg.AssetCheckResult


def scrubbed(event: Event) -> Event:
    """The same event with every text of its metadata, and of its checks, scrubbed. Paths stay: they are read back."""
    if isinstance(event, dg.AssetCheckResult):
        return _check_result(event)
    return dg.MaterializeResult(
        asset_key=event.asset_key,
        metadata=_metadata(event.metadata or {}),
        check_results=[_check_result(result) for result in event.check_results],
        data_version=event.data_version,
        tags=event.tags,
        value=event.value,
    )


def _check_result(result: dg.AssetCheckResult) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=result.passed,
        asset_key=result.asset_key,
        check_name=result.check_name,
        metadata=_metadata(result.metadata),
        severity=result.severity,
        description=None if result.description is None else scrub(result.description),
    )


def _metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in metadata.items()}


def _value(value: Any) -> Any:
    match value:
        case dg.TextMetadataValue(text=str(text)):
            return dg.MetadataValue.text(scrub(text))
        case dg.MarkdownMetadataValue(md_str=str(text)):
            return dg.MetadataValue.md(scrub(text))
        case dg.UrlMetadataValue(url=str(url)):
            return dg.MetadataValue.url(scrub(url))
        case dg.JsonMetadataValue(data=data):
            return dg.MetadataValue.json(scrub_all(data))
        case str() | list() | dict():
            return scrub_all(value)
    return value


def without_secrets(error: Exception) -> dg.Failure | None:
    """What to raise in place of an error of no kind that is known here, or None where no text of it holds a secret.

    Dagster keeps the message, the stack and the causes of an exception.
    """
    told = "".join(traceback.format_exception(error))
    safe = scrub(told)
    if safe == told:
        return None
    return dg.Failure(
        description=f"{type(error).__name__}: {scrub(str(error))}", metadata={"traceback": dg.MetadataValue.text(safe)}
    )
