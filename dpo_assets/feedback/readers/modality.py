"""What a row holds besides text: tools, which a chat template can render, and what no text model can read.

One place for all readers: columns are looked at before a reader sees the row (`RowByRow`), messages and content parts
where a reader makes a message of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_assets.feedback.readers.base import Item, Row, RowFault, keys_of

UNSUPPORTED = "unsupported_modality"
TOOLS = "tools"
MEDIA = frozenset({"images", "image", "image_url", "image_urls", "videos", "video", "audios", "audio"})
# Besides MEDIA in a message. A column of these names is often something else.
_OF_MESSAGES = frozenset({"files", "attachments", "tool_calls", "function_call", "tool_call_id"})
_NOTHING = frozenset({"", "[]", "{}", "null", "none", "nan"})  # As CSV writes a cell without a value.


def filled(value: Any) -> bool:
    """Whether a value holds something. Null, "", [] and {} do not, nor a list of nulls or an object of nothing else."""
    if isinstance(value, str):
        return value.strip().lower() not in _NOTHING
    if isinstance(value, Mapping):
        return any(map(filled, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return any(item is not None for item in value)
    return bool(value)


def refuse_media(row: Row, where: str = "") -> None:
    """Refuses a row, or an object of fields inside it, with a filled column of pictures, sound or films.

    Raises:
        RowFault: `unsupported_modality`.
    """
    if MEDIA.isdisjoint(row):
        return
    for name in sorted(MEDIA):
        if filled(row.get(name)):
            hint = "" if where else f"; if it is something else, {_rename(name)}"
            raise RowFault(UNSUPPORTED, f"`{where}{name}` is filled; only text can be read{hint}")


def _rename(name: str) -> str:
    return f"rename it: `columns: {{my_{name}: {name}}}`"


def refuse_beside_text(message: Row, where: str) -> None:
    """Refuses a message that carries pictures, sound, files or tool calls beside its text.

    Raises:
        RowFault: `unsupported_modality`.
    """
    for name in message:
        if (name in MEDIA or name in _OF_MESSAGES) and filled(message[name]):
            raise RowFault(UNSUPPORTED, f"{where} has `{name}`; only text can be read")


def without_tools(row: Row) -> tuple[Row, str]:
    """The row without its column of tools, and these tools (see `tools_text`).

    Raises:
        RowFault: `unsupported_modality`, for tools that are no definitions of functions.
    """
    if TOOLS not in row:
        return row, ""
    try:
        tools = tools_text(row[TOOLS], TOOLS)
    except RowFault as fault:
        # Names alone, or notes of a tool that was used: a column that only happens to be called so.
        raise RowFault(fault.reason, f"{fault.message}; if it is something else, {_rename(TOOLS)}") from None
    return {name: value for name, value in row.items() if name != TOOLS}, tools


def with_tools(items: Iterable[Item], tools: str) -> Iterator[Item]:
    """The items of a row that offered these tools; those that have their own keep them."""
    for item in items:
        yield item if not tools or isinstance(item, RowFault) else replace(item, tools=item.tools or tools)


def tools_text(value: Any, where: str) -> str:
    """Tool definitions as `Pair.tools` keeps them, "" for none.

    That is JSON of a list of `{"type": "function", "function": {"name", "description", "parameters"}}`, as OpenAI's API
    and TRL's `tools` column have it (TRL documentation, Dataset formats and types, Tool calling). Definitions that lack
    the outer object (LLaMA-Factory, OpenAI's `functions`) get it. The order of keys is kept, because templates render
    it; entries that are null are left out, as TRL does (Parquet gives every function every other one's parameters).

    Args:
        value: a list of definitions, or the same as JSON text.
        where: its name in the row.

    Raises:
        RowFault: `unsupported_modality` for what no chat template can render.
    """
    if not isinstance(value, str) and not filled(value):
        return ""
    if isinstance(value, str):
        if not filled(value):
            return ""
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowFault(UNSUPPORTED, f"`{where}` is text that is not JSON; expected a list of functions") from None
    if not isinstance(value, list):
        raise RowFault(UNSUPPORTED, f"`{where}` is {type(value).__name__}; expected a list of functions")
    tools = [_definition(_without_nulls(tool), f"{where}[{n}]") for n, tool in enumerate(value)]
    try:
        text = json.dumps(tools, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError):
        raise RowFault(UNSUPPORTED, f"`{where}` holds what is no JSON") from None
    return text if tools else ""


def _definition(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise RowFault(UNSUPPORTED, f"`{where}` is {type(tool).__name__}; expected a function with its name")
    kind, inner = tool.get("type", "function"), tool.get("function")
    if kind == "function" and isinstance(inner, Mapping) and _is_function(inner):
        return dict(tool) if "type" in tool else {"type": kind, **tool}
    bare = {name: value for name, value in tool.items() if name != "type"}
    if kind == "function" and inner is None and _is_function(bare) and ("parameters" in bare or "description" in bare):
        return {"type": kind, "function": bare}
    raise RowFault(UNSUPPORTED, f"`{where}` is no function that a chat template can render; it has: {keys_of(tool)}")


def _is_function(value: Row) -> bool:
    return isinstance(value.get("name"), str) and bool(value["name"].strip())


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
