"""One record of an input, in any of the known shapes, to messages; or the reason it is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

Message = dict[str, str]

KNOWN_SHAPES = (
    "messages: [{role, content}, ...]",
    "conversations: [{from, value}, ...] (ShareGPT)",
    "instruction, input (optional), output (Alpaca)",
    "prompt, completion (texts, or lists of messages)",
    "text",
)

COLUMNS = (
    "id",
    "messages",
    "conversations",
    "system",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
)
"""Fields that are looked at, besides the one that names the source."""

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "text": "text",
}


class DropReason(StrEnum):
    """Why a record is left out of the corpus."""

    UNREADABLE = "line that is not JSON"
    NOT_AN_OBJECT = "not an object of fields"
    TOO_LARGE = "larger than 64 MiB"
    UNKNOWN_SHAPE = "unknown shape"
    MALFORMED = "malformed turn"
    UNKNOWN_ROLE = "unknown role"
    NOT_TEXT = "content that is not text"
    TOOL_CALL = "tool call of the assistant"
    EMPTY_TURN = "empty turn"
    NO_ASSISTANT = "no assistant turn"
    BAD_LABEL = "id or source that is neither text nor a whole number"
    NOT_UNICODE = "text that is not valid Unicode"
    TEMPLATE = "does not fit the chat template"
    NOTHING_SUPERVISED = "no supervised token within max_length"


class RecordDropped(Exception):
    """Not a failure of the run: this record cannot be used, for `reason`."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Record(NamedTuple):
    """What is kept of a record.

    Attributes:
        id: Its own, None if it has none.
        source: Its own, None if it has none.
        messages: At least one turn of the assistant, or one of role `text`; no empty turn.
    """

    id: str | None
    source: str | None
    messages: list[Message]


def parse_line(line: bytes) -> Any:
    """The JSON value of one line.

    Raises:
        RecordDropped: If the line is not JSON in UTF-8.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordDropped(DropReason.UNREADABLE) from error


def has_known_shape(fields: Any) -> bool:
    """Whether a record is of a known shape, whatever its turns hold."""
    return isinstance(fields, Mapping) and _find_shape(fields) is not None


def normalise(fields: Any, *, source_field: str | None = "source") -> Record:
    """Bring a record to messages.

    Roles are brought to system, developer, user, assistant and tool; system turns without content
    are left out. Of the shapes that fit, the first in `KNOWN_SHAPES` counts.

    Args:
        fields: A record as it was read.
        source_field: Field that names the source; None leaves the source to the input.

    Raises:
        RecordDropped: If the record cannot be used.
    """
    if not isinstance(fields, Mapping):
        raise RecordDropped(DropReason.NOT_AN_OBJECT)
    shape = _find_shape(fields)
    if shape is None:
        raise RecordDropped(DropReason.UNKNOWN_SHAPE)
    turns = shape(fields)
    messages = [_message(*turn) for turn in turns if not _is_blank_system(*turn)]
    if shape is not _from_messages and fields.get("system"):
        messages.insert(0, _message("system", fields["system"]))
    roles = {message["role"] for message in messages}
    if "text" in roles:
        if len(messages) > 1:
            raise RecordDropped(DropReason.MALFORMED)
    elif "assistant" not in roles:
        raise RecordDropped(DropReason.NO_ASSISTANT)
    source = None if source_field is None else _label(fields.get(source_field))
    return Record(id=_label(fields.get("id")), source=source, messages=messages)


Turn = tuple[Any, Any]
Shape = Callable[[Mapping[str, Any]], list[Turn]]


def _find_shape(fields: Mapping[str, Any]) -> Shape | None:
    # Tables fill the columns that a row does not use with None.
    present = {name for name in COLUMNS if fields.get(name) is not None}
    if "messages" in present:
        return _from_messages
    if "conversations" in present:
        return _from_conversations
    if {"instruction", "output"} <= present:
        return _from_instruction
    if {"prompt", "completion"} <= present:
        return _from_prompt
    return _from_text if "text" in present else None


def _from_messages(fields: Mapping[str, Any]) -> list[Turn]:
    return _turns(fields["messages"])


def _from_conversations(fields: Mapping[str, Any]) -> list[Turn]:
    return _turns(fields["conversations"])


def _from_instruction(fields: Mapping[str, Any]) -> list[Turn]:
    instruction, context = fields["instruction"], fields.get("input")
    if context not in (None, ""):
        instruction = f"{_text(instruction)}\n\n{_text(context)}"
    return [("user", instruction), ("assistant", fields["output"])]


def _from_prompt(fields: Mapping[str, Any]) -> list[Turn]:
    prompt, completion = fields["prompt"], fields["completion"]
    before = [("user", prompt)] if isinstance(prompt, str) else _turns(prompt)
    after = [("assistant", completion)] if isinstance(completion, str) else _turns(completion)
    return before + after


def _from_text(fields: Mapping[str, Any]) -> list[Turn]:
    return [("text", fields["text"])]


def _turns(value: Any) -> list[Turn]:
    """Role and content of each turn; a list of structs, or the struct of lists of some tables."""
    if isinstance(value, Mapping):
        keys = ("role", "content") if "role" in value else ("from", "value")
        roles, contents = (value.get(key) for key in keys)
        if not (isinstance(roles, Sequence) and isinstance(contents, Sequence)):
            raise RecordDropped(DropReason.MALFORMED)
        if len(roles) != len(contents):
            raise RecordDropped(DropReason.MALFORMED)
        return list(zip(roles, contents, strict=True))
    if not isinstance(value, list):
        raise RecordDropped(DropReason.MALFORMED)
    turns: list[Turn] = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise RecordDropped(DropReason.MALFORMED)
        # The call is not part of the content: what would be left is another conversation.
        if turn.get("tool_calls") or turn.get("function_call"):
            raise RecordDropped(DropReason.TOOL_CALL)
        if turn.get("role") is not None:
            turns.append((turn["role"], turn.get("content")))
        elif turn.get("from") is not None:
            turns.append((turn["from"], turn.get("value")))
        else:
            raise RecordDropped(DropReason.MALFORMED)
    return turns


def _is_blank_system(role: Any, content: Any) -> bool:
    return role == "system" and (
        content is None or (isinstance(content, str) and content.isspace()) or content == ""
    )


def _message(role: Any, content: Any) -> Message:
    if not isinstance(role, str):
        raise RecordDropped(DropReason.MALFORMED)
    known = _ROLES.get(role.lower())
    if known is None:
        raise RecordDropped(DropReason.UNKNOWN_ROLE)
    text = "" if content is None else _text(content)
    if not text.strip():
        raise RecordDropped(DropReason.EMPTY_TURN)
    return {"role": known, "content": text}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RecordDropped(DropReason.NOT_TEXT)


def _label(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RecordDropped(DropReason.BAD_LABEL)
