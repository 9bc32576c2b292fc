"""What a row of a data set says: token ids, text, or a conversation; and which of its fields say it.

Field names are those of the data sets that people train on: `messages` (OpenAI), `conversations` (ShareGPT), `prompt` and `completion`,
`instruction`, `input` and `output` (Alpaca), `text`, `input_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebit.calibration.rows import Row
from moebit.errors import BadInputError
from moebit.recipe.reading import parse_json

# In the order in which they are looked for; the first set of which a row has every field is taken.
KNOWN: tuple[tuple[str, ...], ...] = (
    ("input_ids",),
    ("messages",),
    ("conversations",),
    ("text",),
    ("prompt", "completion"),
    ("instruction", "output"),
)
FIELDS = frozenset({field for fields in KNOWN for field in fields} | {"input", "system", "tools"})
# Who speaks, by ShareGPT's names.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


@dataclass(frozen=True)
class Said:
    """What one row says.

    Attributes:
        ids: token ids, or None. text: prose, or None. messages: a conversation, or None; with `tools` for its template.
        plain: the conversation as prose, for a tokenizer without a chat template; None where roles must not get lost.
        fields: those that were read.
    """

    fields: tuple[str, ...]
    ids: list[Any] | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: Any = None
    plain: str | None = None


def read_row(row: Row, column: str | None) -> Said:
    """What a row says, by the field that the user named or else by the first that is known.

    Raises:
        BadInputError: no such field, or a value of another type than its name says.
    """
    fields = row.fields
    if not isinstance(fields, Mapping):
        raise BadInputError(f"{row.where}: expected an object with {_wanted()}, got {type(fields).__name__}")
    if column is not None:
        if column not in fields:
            raise BadInputError(f"{row.where}: has no field {column!r}; it has {_named(fields)}")
        return _value(row, column, fields)
    for names in KNOWN:
        if all(name in fields for name in names):
            return _known(row, names, fields)
    raise BadInputError(f"{row.where}: expected {_wanted()}; it has {_named(fields)}: name the one that is meant, --text FILE:FIELD")


def _wanted() -> str:
    return ", ".join(" and ".join(names) for names in KNOWN[:-1]) + " or " + " and ".join(KNOWN[-1])


def _named(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(fields)[:12])) + (" …" if len(fields) > 12 else "") or "none"


def _known(row: Row, names: tuple[str, ...], fields: Mapping[str, Any]) -> Said:
    if len(names) == 1:
        return _value(row, names[0], fields)
    first, last = (fields[name] for name in names)
    if isinstance(first, list) or isinstance(last, list):
        before = _messages(row, names[0], _as_list(first, "user"))
        after = _messages(row, names[1], _as_list(last, "assistant"))
        return Said(names, messages=[*before, *after], tools=_tools(row, fields))
    given = fields.get("input") if names[0] == "instruction" else None
    used = (*names, "input") if given else names
    for name in used:
        if not isinstance(fields[name], str):
            raise BadInputError(f"{row.where}: {name} must be a string, got {type(fields[name]).__name__}")
    asked = f"{first}\n\n{given}" if given else first
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": last}]
    between = "" if names[0] == "prompt" else "\n\n"
    return Said(used, messages=_with_system(row, fields, messages), tools=_tools(row, fields), plain=f"{asked}{between}{last}")


def _as_list(value: Any, role: str) -> Any:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _value(row: Row, name: str, fields: Mapping[str, Any]) -> Said:
    """A single field: its name decides where it is a known one, else what its value is."""
    value = fields[name]
    if isinstance(value, str) and name in ("messages", "conversations", "input_ids"):  # as tables hold them
        try:
            value = parse_json(value)
        except ValueError:
            value = None
    objects = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    if name == "messages" or name == "conversations" or (objects and name != "input_ids"):
        if not isinstance(value, list):
            raise BadInputError(f"{row.where}: {name} must be a list of {{role, content}} or {{from, value}}")
        messages = _with_system(row, fields, _messages(row, name, value))
        return Said((name,), messages=messages, tools=_tools(row, fields))
    if name == "input_ids" or (isinstance(value, list) and name != "text"):
        if not isinstance(value, list) or not all(type(i) is int and abs(i) < 2**31 for i in value):
            raise BadInputError(f"{row.where}: {name} must be a list of token ids (integers)")
        return Said((name,), ids=value)
    if not isinstance(value, str):
        raise BadInputError(f"{row.where}: {name} must be a string, got {type(value).__name__}")
    return Said((name,), text=value)


def _messages(row: Row, name: str, turns: list[Any]) -> list[dict[str, Any]]:
    """A conversation with the roles of chat templates. What a turn has beside role and content (tool calls, reasoning) is kept."""
    result = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadInputError(f"{row.where}: {name} must be a list of {{role, content}} or {{from, value}}")
        if "role" in turn:
            result.append({key: value for key, value in turn.items() if value is not None})
            continue
        speaker = SPEAKERS.get(str(turn.get("from")).lower())
        if speaker is None or "value" not in turn:
            raise BadInputError(
                f"{row.where}: {name} has a turn from {turn.get('from')!r}, which is none of {', '.join(SPEAKERS)}; "
                "convert it to messages with role and content"
            )
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "weight") and value is not None}
        result.append({"role": speaker, "content": turn["value"], **rest})
    return result


def _with_system(row: Row, fields: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system's part, where it stands in a field of its own."""
    system = fields.get("system")
    if not system or (messages and messages[0].get("role") == "system"):
        return messages
    if not isinstance(system, str):
        raise BadInputError(f"{row.where}: system must be a string, got {type(system).__name__}")
    return [{"role": "system", "content": system}, *messages]


def _tools(row: Row, fields: Mapping[str, Any]) -> Any:
    """What may be called, for the template: a list, or JSON of one as tables hold it."""
    tools = fields.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise BadInputError(f"{row.where}: tools: not valid JSON ({error})") from error
    if tools is not None and not isinstance(tools, list):
        raise BadInputError(f"{row.where}: tools must be a list, got {type(tools).__name__}")
    return tools or None
