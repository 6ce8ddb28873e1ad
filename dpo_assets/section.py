"""A part of a recipe: unknown keys are refused with the nearest known one, and faults are told one line each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails

from dpo_assets.secret_shapes import masked, without_url_secrets


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors that name the nearest known key."""

    # The JSON schema, which `dg check` applies before anything else, leaves unknown keys to the validator below:
    # jsonschema would end the check with "additional properties are not allowed", before a suggestion could be made.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra=lambda schema: schema.pop("additionalProperties", None) and None,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, Mapping) else []
        if not unknown:
            try:
                return validate(data)
            except ValidationError as error:
                raise ValidationError.from_exception_data(cls.__name__, _faults_of(error)) from None
        # The rest is validated too, so that one reading names every fault. pydantic merges the line errors of a
        # ValidationError raised here, so each keeps its own place in the file.
        faults = [_unknown_key_fault(str(key), list(cls.model_fields)) for key in unknown]
        try:
            validate({key: value for key, value in data.items() if key in cls.model_fields})
        except ValidationError as error:
            faults += _faults_of(error)
        raise ValidationError.from_exception_data(cls.__name__, faults)


def hidden_fault(message: str) -> ValidationError:
    """For a validator of a field: a fault that does not repeat the value, which may be a secret."""
    fault: InitErrorDetails = {"type": "value_error", "input": "...", "ctx": {"error": ValueError(message)}}
    return ValidationError.from_exception_data("value", [fault])


def _faults_of(error: ValidationError) -> list[InitErrorDetails]:
    """The line errors of a ValidationError, whose inputs tell no secret of a URL: Dagster shows them as they are."""
    faults = error.errors(include_url=False)
    return [cast("InitErrorDetails", {**fault, "input": _shown(fault["input"])}) for fault in faults]


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return without_url_secrets(value)
    if isinstance(value, Mapping):
        return {key: _shown(one) for key, one in value.items()}
    return [_shown(one) for one in value] if isinstance(value, list | tuple) else value


def _unknown_key_fault(key: str, known: list[str]) -> InitErrorDetails:
    """One line error. It does not repeat the value: people write tokens into keys that do not exist."""
    message = ValueError(_unknown_key_message(key, known))
    return {"type": "value_error", "loc": (key,), "input": "...", "ctx": {"error": message}}


def _unknown_key_message(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(f'`{k}`' for k in known)}."
    return f"there is no key `{key}` here; {hint}"


def describe_validation_error(error: ValidationError) -> str:
    """One line per fault, `section.field: message (got value)`."""
    return "\n".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'recipe'}: {describe_fault(fault)}"
        for fault in error.errors()
    )


def describe_fault(fault: ErrorDetails) -> str:
    """`message (got value)` of one fault of a ValidationError, with what is shaped like a secret masked."""
    message = fault["msg"].removeprefix("Value error, ")
    told = isinstance(fault["input"], Mapping) or fault["input"] == "..."
    return masked(message if told else f"{message} (got {fault['input']!r})")
