"""One turn of a conversation, as data sets write it, to a message; or why it is dropped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from slap_stream.text.template import REASONING_FIELDS, TurnsError
from slap_stream.text.turns import LEARN_FIELDS, is_learnt

Message = dict[str, Any]
"""`role` and `content`; of the assistant perhaps `reasoning_content`, and `train: False` on a turn
that is not to be learnt; on the first perhaps `tools`."""

ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value", "text")

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    # What the assistant writes to call one, in a turn of its own: read, and never supervised.
    "function_call": "tool",
    "tool_call": "tool",
    "text": "text",
}
_TEXT_PARTS = (None, "text", "input_text", "output_text")


class DropReason(StrEnum):
    """Why a record is left out of the corpus."""

    UNREADABLE = "line that is not JSON"
    NOT_CSV = "row that is not CSV"
    UNLIKE_HEADER = "row with more or fewer cells than there are columns"
    NOT_AN_OBJECT = "not an object of fields"
    TOO_LARGE = "larger than 64 MiB"
    UNKNOWN_SHAPE = "unknown shape"
    NO_VALUE = "field without a value"
    MALFORMED = "malformed turn"
    UNKNOWN_ROLE = "unknown role"
    NOT_TEXT = "content that is not text"
    TOOL_CALL = "tool call of the assistant"
    BAD_TOOLS = "tools that are not one list of objects"
    BAD_WEIGHT = "turn that is neither to be learnt nor not"
    BAD_HISTORY = "history that is not pairs of texts before a prompt"
    TWO_SYSTEMS = "two system texts that differ"
    ONE_OF_A_TREE = "one message of a tree, in a row of its own"
    EMPTY_TURN = "empty turn"
    NO_ASSISTANT = "no assistant turn"
    NOTHING_TO_LEARN = "no assistant turn that is to be learnt"
    BAD_LABEL = "id or source that is neither text nor a whole number"
    PACKED = "several samples in one row"
    BAD_TOKENS = "token ids that do not go together"
    OTHER_LABELS = "labels that are neither the token ids nor -100"
    NOT_UNICODE = "text that is not valid Unicode"
    TEMPLATE = "does not fit the chat template"
    TOO_LONG = "longer than max_length"
    NOTHING_SUPERVISED = "no supervised token within max_length"


class RecordDropped(Exception):
    """Not a failure of the run: this record cannot be used, for `reason`.

    Attributes:
        reason: Why.
        detail: The value that is to blame, or what it is; may be empty.
    """

    def __init__(self, reason: DropReason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


def is_given(value: Any) -> bool:
    """Whether a field says something: tables fill what a row does not use, with None or NaN."""
    if isinstance(value, str | list | dict | bytes):
        return bool(value)
    return not is_missing(value)


def is_missing(value: Any) -> bool:
    """Whether there is nothing in a field, not even an empty text."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_turns(value: Any) -> list[Mapping[str, Any]]:
    """The turns of a field: a list of structs, a struct of lists, or either as JSON text.

    Raises:
        RecordDropped: If it is neither.
    """
    if isinstance(value, str | bytes):
        value = from_json(value, DropReason.MALFORMED)
    if isinstance(value, Mapping):
        columns = {name: column for name, column in value.items() if column is not None}
        if not all(isinstance(column, list) for column in columns.values()):
            raise RecordDropped(DropReason.MALFORMED, "fields that are not lists")
        if len({len(column) for column in columns.values()}) != 1:
            raise RecordDropped(DropReason.MALFORMED, "lists of unlike length")
        rows = zip(*columns.values(), strict=True)
        value = [dict(zip(columns, row, strict=True)) for row in rows]
    if not isinstance(value, list):
        raise RecordDropped(DropReason.MALFORMED, f"turns that are a {type(value).__name__}")
    for turn in value:
        if not isinstance(turn, Mapping):
            raise RecordDropped(DropReason.MALFORMED, f"a turn that is a {type(turn).__name__}")
    return value


def from_json(text: str | bytes, reason: DropReason) -> Any:
    """What a text holds that a table keeps as JSON.

    Raises:
        RecordDropped: If it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordDropped(reason, "text that is not JSON") from error


def read_message(turn: Mapping[str, Any], unused: set[str]) -> Message:
    """A turn as a message with its `tools`; only a system turn may say nothing.

    Args:
        turn: As it was read.
        unused: Gets the names of fields that say something and are not used.

    Raises:
        RecordDropped: If it cannot be used.
    """
    # Nearly all turns are like this, and there are many.
    if len(turn) == 2:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        known = _ROLES.get(role) if isinstance(role, str) else None
        if known is not None and isinstance(content, str) and content.strip():
            return {"role": known, "content": content}
    # The call is not part of the content: what would be left is another conversation.
    if turn.get("tool_calls") or turn.get("function_call"):
        raise RecordDropped(DropReason.TOOL_CALL)
    role_field = _first_given(turn, ROLE_FIELDS)
    if role_field is None:
        raise RecordDropped(DropReason.MALFORMED, "no role")
    given = turn[role_field]
    if isinstance(given, bytes):
        given = text_of(given)
    if not isinstance(given, str):
        raise RecordDropped(DropReason.MALFORMED, f"a role that is a {type(given).__name__}")
    role = _ROLES.get(given.strip().lower())
    if role is None:
        raise RecordDropped(DropReason.UNKNOWN_ROLE, given)
    content_field = _first_given(turn, CONTENT_FIELDS)
    content = "" if content_field is None else text_of(turn[content_field])
    if not content.strip() and role != "system":
        raise RecordDropped(DropReason.EMPTY_TURN, role)
    message: Message = {"role": role, "content": content}
    used = {role_field, content_field}
    if role == "assistant":
        used |= _read_of_assistant(turn, message)
    if "tools" in turn and (tools := read_tools(turn["tools"])):
        message["tools"] = tools
        used.add("tools")
    # That what is never learnt is not to be learnt is nothing to use.
    idle = {name for name in LEARN_FIELDS if not turn.get(name)}
    unused |= {
        f"{name} of a turn"
        for name, value in turn.items()
        if is_given(value) and name not in used and name not in idle
    }
    return message


def _read_of_assistant(turn: Mapping[str, Any], message: Message) -> set[str]:
    used = set(LEARN_FIELDS)
    try:
        if not is_learnt(
            {name: turn.get(name) for name in LEARN_FIELDS if is_given(turn.get(name))}
        ):
            message["train"] = False
    except TurnsError as error:
        raise RecordDropped(DropReason.BAD_WEIGHT, error.short) from error
    thought_field = _first_given(turn, REASONING_FIELDS)
    if thought_field is not None:
        thought = text_of(turn[thought_field])
        if thought.strip():
            message["reasoning_content"] = thought
        used |= {name for name in REASONING_FIELDS if turn.get(name) in (thought, None)}
        used.add(thought_field)
    return used


def read_tools(value: Any) -> list[Any]:
    """Tools that a conversation may call, which may be JSON text; none for none.

    Raises:
        RecordDropped: If they are something else.
    """
    if isinstance(value, str | bytes) and value.strip():
        value = from_json(value, DropReason.BAD_TOOLS)
    if not is_given(value):
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RecordDropped(DropReason.BAD_TOOLS)
    return value


def text_of(content: Any) -> str:
    """The text of a field: a text, its UTF-8, or a list of parts that are texts.

    Raises:
        RecordDropped: If there is something else in it.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, bytes):
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise RecordDropped(DropReason.NOT_UNICODE) from error
    if isinstance(content, Sequence):
        return "".join(_text_of_part(part) for part in content)
    raise RecordDropped(DropReason.NOT_TEXT, type(content).__name__)


def _text_of_part(part: Any) -> str:
    if not isinstance(part, Mapping):
        raise RecordDropped(DropReason.NOT_TEXT, f"a part that is a {type(part).__name__}")
    others = [
        name for name, value in part.items() if name not in ("type", "text") and is_given(value)
    ]
    kind = part.get("type")
    text = part.get("text")
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise RecordDropped(DropReason.NOT_TEXT, f"a part of type {kind}")
    if others:
        raise RecordDropped(DropReason.NOT_TEXT, f"a part with {others[0]}")
    return text


def _first_given(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if is_given(fields.get(name))), None)
