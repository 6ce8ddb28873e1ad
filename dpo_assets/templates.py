"""Templates in a `defs.yaml`: `{{ env.X }}` works for every field and type, and text stays text.

Dagster's own rendering reads every text as a Python literal once it is rendered, so that a revision of forty zeros
becomes the number 0. Here the scope is Dagster's (`env`, `dg`, `datetime`, `context`, and the template variables of the
project), and a rendered text is what would have stood in the file: text where the field takes text, else the value that
YAML reads from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from jinja2 import Environment, StrictUndefined, TemplateError, Undefined, meta
from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from dpo_assets.section import describe_fault

Place = tuple[str | int, ...]  # Keys and indices from the top of the attributes.
ModelT = TypeVar("ModelT", bound=BaseModel)

# Fields that hold sentences: braces in them are text, unless they name something of the scope.
PROSE = frozenset({"reason", "note"})
# Fields that take a value of any kind: no type says whether "false" is meant as text, so it is what YAML reads.
ANY_VALUE = frozenset({"template_arguments"})
_MARK = r"\{[{%]"
_WHOLE = re.compile(r"\s*\{\{(.*)\}\}\s*", re.DOTALL)
_JINJA = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


class TemplateFault(ValueError):
    """A template that cannot be rendered, with the reason."""


class SetVariables:
    """`env` of a template. An unset variable is an error that names it, and not None, unless a default follows.

    `{{ env.X }}`, `{{ env('X') }}`, `{{ env.X | default('text') }}` and `{{ env('X', 'text') }}`.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("jinja", "_")):
            raise AttributeError(name)  # Jinja asks every object for marks of its own.
        return self(name)

    def __call__(self, name: str, *default: Any) -> Any:
        if name in self._variables:
            return self._variables[name]
        return default[0] if default else StrictUndefined(hint=f"the environment variable {name} is not set")


def templates_in(values: Any, at: Place = ()) -> dict[Place, str]:
    """The texts of nested values that hold a template, by their place."""
    if isinstance(values, str):
        return {at: values} if re.search(_MARK, values) else {}
    if isinstance(values, Mapping):
        inner = [(key, value) for key, value in values.items()]
    elif isinstance(values, Sequence) and not isinstance(values, bytes):
        inner = list(enumerate(values))
    else:
        return {}
    return {place: text for key, value in inner for place, text in templates_in(value, (*at, key)).items()}


def _keys_in(values: Any, at: Place = ()) -> list[Place]:
    """The places of keys that hold a template."""
    if isinstance(values, Mapping):
        own = [(*at, key) for key in values if re.search(_MARK, str(key))]
        return own + [place for key, value in values.items() for place in _keys_in(value, (*at, key))]
    several = enumerate(values) if isinstance(values, Sequence) and not isinstance(values, str | bytes) else ()
    return [place for n, value in several for place in _keys_in(value, (*at, n))]


def rendered(text: str, scope: Mapping[str, Any], *, prose: bool = False) -> Any:
    """The value of a template: what a lone `{{ expression }}` gives, as it is; else a text.

    Raises:
        TemplateFault: it is no template, or names what is not there. In `prose` such braces are text.
    """
    try:
        unknown = meta.find_undeclared_variables(_JINJA.parse(text)) - set(scope)
    except TemplateError as error:
        if prose:
            return text
        raise TemplateFault(f"it is no template: {error.message}. {_LITERALLY}") from None
    if unknown and prose:
        return text
    if unknown:
        names = ", ".join(f"`{name}`" for name in sorted(unknown))
        known = ", ".join(f"`{name}`" for name in sorted(scope) if not name.startswith("_"))
        raise TemplateFault(f"templates know no {names}; they know {known}. {_LITERALLY}")
    try:
        lone = _WHOLE.fullmatch(text)
        if lone and "{{" not in lone[1] and "}}" not in lone[1]:
            value = _JINJA.compile_expression(lone[1].strip("+-"), undefined_to_none=False)(**scope)
            return str(value) if isinstance(value, Undefined) else value  # As text, an undefined value is an error.
        return _JINJA.from_string(text).render(**scope)
    except Exception as error:  # Whatever an expression of the user's raises.
        raise TemplateFault(str(error) or type(error).__name__) from None


_LITERALLY = "Braces that are meant as they are: {{ '{{' }}"


def resolve(model: type[ModelT], values: Mapping[str, Any], scope: Mapping[str, Any]) -> ModelT:
    """The model of `values`, whose templates are rendered first.

    Raises:
        ResolveFaults: by place, what is wrong. A rendered value is not repeated: it may be a secret.
    """
    found = templates_in(values)
    filled: dict[Place, Any] = {}
    faults = dict.fromkeys(_keys_in(values), "a key is no template: write its name, and a template as its value")
    for place, text in found.items():
        try:
            filled[place] = rendered(text, scope, prose=place[-1] in PROSE)
        except TemplateFault as error:
            faults[place] = f"the template {text}: {error}"
    if faults:
        raise ResolveFaults(faults)
    untyped = {place for place in filled if any(part in ANY_VALUE for part in place)}
    filled |= {place: _as_yaml(filled[place]) for place in untyped}
    try:
        return model.model_validate(_with(values, filled))
    except ValidationError as error:
        first = error
    refused = {p for p in filled if any(_below(fault["loc"], p) for fault in first.errors())}
    try:
        return model.model_validate(_with(values, filled | {place: _as_yaml(filled[place]) for place in refused}))
    except ValidationError as error:
        still = {tuple(fault["loc"]): fault for fault in error.errors(include_url=False)}
    # What is said of the text itself says more than what is said of the value that YAML made of it.
    of_text = {tuple(fault["loc"]): fault for fault in first.errors(include_url=False)}
    for place, fault in still.items():
        template = next((text for at, text in found.items() if _below(place, at)), None)
        said = of_text.get(place, fault)["msg"].removeprefix("Value error, ")
        faults[place] = f"{said} (from the template {template})" if template else describe_fault(fault)
    raise ResolveFaults(faults)


class ResolveFaults(Exception):
    """What is wrong with values that hold templates, by place."""

    def __init__(self, faults: Mapping[Place, str]) -> None:
        super().__init__("\n".join(faults.values()))
        self.faults = faults


def _as_yaml(value: Any) -> Any:
    """What YAML reads from a text; any other value as it is."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def _with(values: Any, filled: Mapping[Place, Any], at: Place = ()) -> Any:
    """`values` with what stands at the places of `filled`."""
    if at in filled:
        return filled[at]
    if isinstance(values, Mapping):
        return {key: _with(value, filled, (*at, key)) for key, value in values.items()}
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return [_with(value, filled, (*at, n)) for n, value in enumerate(values)]
    return values


def _below(place: Sequence[str | int], at: Place) -> bool:
    return tuple(place[: len(at)]) == at


class Templated(BaseModel):
    """For a model of a YAML file: accepts a template wherever a value may stand, and keeps all values as written.

    Everything else is judged at once, so that a fault is found without rendering; what stands on a template is judged
    by `resolve`.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _leave_templates(cls, data: Any, validate: Any) -> Any:
        found = templates_in(data)
        try:
            validate(data)
        except ValidationError as error:
            known = [f for f in error.errors(include_url=False) if not _depends(tuple(f["loc"]), found)]
            if known:
                raise ValidationError.from_exception_data(cls.__name__, [_line(fault) for fault in known]) from None
        return cls.model_construct(**data)

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The JSON schema, with a template as another value of each property."""
        schema = super().model_json_schema(*arguments, **options)
        for part in (schema, *schema.get("$defs", {}).values()):
            for name, value in part.get("properties", {}).items():
                part["properties"][name] = _or_template(value)
        return schema


def _depends(place: Place, found: Mapping[Place, str]) -> bool:
    """Whether a fault at `place` may be due to a template: it stands on one, or is of a section that holds one."""
    return any(_below(place, at) or _below(at, place) for at in found)


def _line(fault: Any) -> InitErrorDetails:
    context = fault.get("ctx", {})
    return {"type": fault["type"], "loc": fault["loc"], "input": fault["input"], "ctx": context}


_ABOUT = ("title", "description", "default", "examples")


def _or_template(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema under which a template passes too. Any other value is told what the schema itself would tell it."""
    inner = {key: value for key, value in schema.items() if key not in _ABOUT}
    for key in ("items", "additionalProperties"):
        if isinstance(inner.get(key), dict):
            inner[key] = _or_template(inner[key])
    if inner == {"type": "string"} or not inner:
        return schema
    about = {key: value for key, value in schema.items() if key in _ABOUT}
    return {**about, "if": {"type": "string", "pattern": _MARK}, "then": {}, "else": inner}
