"""One record of an input, in any of the known shapes, to messages; or the reason it is dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from slap_stream.corpus.field_map import FieldMap, Groups, check_fields
from slap_stream.corpus.messages import (
    DropReason,
    Message,
    RecordDropped,
    is_given,
    is_missing,
    read_message,
    read_tools,
    read_turns,
    text_of,
)
from slap_stream.corpus.token_rows import TOKEN_FIELDS, Tokens, holds_tokens, read_tokens
from slap_stream.text.template import TurnsError
from slap_stream.text.turns import tools_of

KNOWN_SHAPES = (
    "input_ids, with labels, completion_mask or assistant_masks, or none of them (if there is a "
    "tokenizer, the one that made them)",
    "messages: [{role, content}, ...]",
    "conversations: [{from, value}, ...] (ShareGPT)",
    "instruction, input or context (optional), output (Alpaca, Dolly)",
    "prompt, question or query with completion, response or answer (texts, or lists of messages)",
    "text",
)

_LISTS = ("messages", "conversations")
_PROMPTS = ("instruction", "prompt", "question", "query")
_ANSWERS = ("output", "completion", "response", "answer")
_CONTEXTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_BESIDE = (*_SYSTEMS, "history", "tools")
# Of each of these a record has one; the first that is there counts.
_GROUPS = (_LISTS, _PROMPTS, _ANSWERS, _CONTEXTS, ("text",))
_MAPPED = ("id", *(name for group in _GROUPS for name in group), *_BESIDE)
# Fields of rows that hold one message of a conversation each, as OpenAssistant's do.
_OF_A_TREE = ("role", "parent_id")

COLUMNS = (
    "id",
    *_LISTS,
    *_PROMPTS,
    *_CONTEXTS,
    *_ANSWERS,
    "text",
    *_BESIDE,
    *_OF_A_TREE,
)
"""Fields that are looked at, besides the one that names the source."""


class Record(NamedTuple):
    """What is kept of a record.

    Attributes:
        id: Its own, None if it has none.
        source: Its own, None if it has none.
        messages: At least one turn of the assistant that is to be learnt, or one of role `text`;
            no empty turn. None of a row of tokens.
        unused: Names of fields that say something and are not used.
        tokens: Of a row that was tokenised before.
    """

    id: str | None
    source: str | None
    messages: list[Message]
    unused: tuple[str, ...] = ()
    tokens: Tokens | None = None


def check_map(fields: Any) -> FieldMap | None:
    """Names of the data for known ones, as `normalise` takes them; None for none.

    Raises:
        ConfigError: If they are no map of names, or map what is not known.
    """
    return check_fields(fields, _MAPPED, (*_GROUPS, _SYSTEMS), _groups_for)


def columns_to_read(
    fields: FieldMap | None, source_field: str | None, *, tokenised: bool = False
) -> list[str]:
    """Fields of a record that are looked at; `tokenised`: as `normalise` takes it."""
    more = [] if fields is None else sorted(fields.sources.difference(COLUMNS))
    more += TOKEN_FIELDS if tokenised and fields is None else ()
    return [*COLUMNS, *more, *([source_field] if source_field else [])]


def has_known_shape(
    record: Any, fields: FieldMap | None = None, *, tokenised: bool = False
) -> bool:
    """Whether a record is of a known shape, whatever its turns hold; `tokenised`: as `normalise`
    takes it."""
    if not isinstance(record, Mapping):
        return False
    if tokenised and fields is None and holds_tokens(record):
        return True
    return _shape(record if fields is None else fields.apply(record), fields) is not None


def shape_by_names(record: Any, fields: FieldMap | None = None) -> tuple[str, ...] | None:
    """The fields of the shape that a record would be of if all of its fields had values."""
    if not isinstance(record, Mapping):
        return None
    given = dict.fromkeys(record, "") if fields is None else fields.apply_to_names(record)
    return _shape(given, fields)


def normalise(
    record: Any,
    *,
    source_field: str | None = "source",
    fields: FieldMap | None = None,
    tokenised: bool = False,
) -> Record:
    """Bring a record to messages.

    Roles are brought to system, developer, user, assistant and tool; system turns without content
    are left out. Of the shapes that fit, the first in `KNOWN_SHAPES` counts, but those before the
    others that a map names. `system`, `history` and `tools` of a record become part of its
    messages; tools, also those of a turn before the first answer, of the first one. Other fields
    are not used, and named.

    Args:
        record: As it was read.
        source_field: Field that names the source; None leaves the source to the input.
        fields: Names in the data for known ones.
        tokenised: Whether records become tokens: where they hold token ids, these count, unless a
            map says what counts.

    Raises:
        RecordDropped: If the record cannot be used.
    """
    if not isinstance(record, Mapping):
        raise RecordDropped(DropReason.NOT_AN_OBJECT)
    if tokenised and fields is None and holds_tokens(record):
        known = {"id", source_field, *TOKEN_FIELDS}
        others = {str(n) for n, value in record.items() if n not in known and is_given(value)}
        return _labelled(record, record, source_field, others, tokens=read_tokens(record))
    given = record if fields is None else fields.apply(record)
    shape = _shape(given, fields)
    if shape is None:
        named = shape_by_names(record, fields)
        if named is None:
            raise RecordDropped(DropReason.UNKNOWN_SHAPE, _some_names(record))
        empty = [name for name in named if is_missing(given[name])]
        told = empty if fields is None else map(fields.name_of, empty)
        raise RecordDropped(DropReason.NO_VALUE, " and ".join(told))
    unused: set[str] = set()
    used = {"id", source_field, *shape}
    if shape == ("text",):
        messages = _document(given)
    else:
        turns = _turns(given, shape)
        if fields is not None and fields.turn:
            turns = [fields.apply_to_turn(turn) for turn in turns]
        messages = [read_message(turn, unused) for turn in turns]
        tools = _take_tools(given, messages)
        messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
        used |= _add_to_conversation(given, shape, messages)
        if tools and messages and messages[0]["role"] != "text":
            messages[0]["tools"] = tools
        elif tools:
            unused.add("tools of a document")
    _check_roles(messages)
    unused |= {str(name) for name, value in given.items() if name not in used and is_given(value)}
    if fields is not None:
        unused = set(map(fields.name_of, unused)) | _displaced(record, fields, source_field)
    return _labelled(record, given, source_field, unused, messages=messages)


def _labelled(
    record: Mapping[str, Any],
    given: Mapping[str, Any],
    source_field: str | None,
    unused: Collection[str],
    *,
    messages: Sequence[Message] = (),
    tokens: Tokens | None = None,
) -> Record:
    return Record(
        id=_label(given.get("id")),
        source=None if source_field is None else _label(record.get(source_field)),
        messages=list(messages),
        unused=tuple(sorted(unused)) if unused else (),
        tokens=tokens,
    )


def _displaced(record: Mapping[str, Any], fields: FieldMap, source_field: str | None) -> set[str]:
    """Fields whose names a map gives to others."""
    names = fields.record.keys() - fields.sources - {source_field}
    return {name for name in names if is_given(record.get(name))}


def _groups_for(mapped: Collection[str]) -> Groups:
    """The names to look for where these are mapped: a map says what the record is made of."""
    groups = [tuple(name for name in group if name in mapped) for group in _GROUPS]
    lists, prompts, answers, contexts, documents = groups
    if lists:
        return lists, (), (), (), ()
    if prompts or answers or contexts:
        return (), prompts or _PROMPTS, answers or _ANSWERS, contexts or _CONTEXTS, ()
    return ((), (), (), (), documents) if documents else _GROUPS


def _shape(given: Mapping[str, Any], fields: FieldMap | None) -> tuple[str, ...] | None:
    """The fields that hold the conversation, prompt before answer; None if there are none."""
    groups = _GROUPS if fields is None else fields.groups
    lists, prompts, answers, contexts, documents = groups
    for name in lists:
        if name in given and not is_missing(given[name]):
            return (name,)
    prompt = next((name for name in prompts if not is_missing(given.get(name))), None)
    answer = next((name for name in answers if not is_missing(given.get(name))), None)
    if prompt is not None and answer is not None:
        context = next((name for name in contexts if is_given(given.get(name))), None)
        return (prompt, answer) if context is None else (prompt, context, answer)
    return next(((name,) for name in documents if not is_missing(given.get(name))), None)


def _document(fields: Mapping[str, Any]) -> list[Message]:
    tree = [name for name in _OF_A_TREE if is_given(fields.get(name))]
    if tree:
        raise RecordDropped(DropReason.ONE_OF_A_TREE, f"text with {' and '.join(tree)}")
    text = text_of(fields["text"])
    if not text.strip():
        raise RecordDropped(DropReason.EMPTY_TURN, "text")
    return [{"role": "text", "content": text}]


def _turns(fields: Mapping[str, Any], shape: Sequence[str]) -> list[Mapping[str, Any]]:
    if len(shape) == 1:
        return read_turns(fields[shape[0]])
    prompt, *context, answer = (fields[name] for name in shape)
    if context:
        prompt = f"{text_of(prompt)}\n\n{text_of(context[0])}"
    turns: list[Mapping[str, Any]] = []
    for role, said in (("user", prompt), ("assistant", answer)):
        is_list = isinstance(said, list | Mapping)
        turns += read_turns(said) if is_list else [{"role": role, "content": said}]
    return turns


def _add_to_conversation(
    fields: Mapping[str, Any], shape: Sequence[str], messages: list[Message]
) -> set[str]:
    """Put in what stands beside a conversation and belongs to it; the names of these fields."""
    if not any(name in fields and is_given(fields[name]) for name in _BESIDE):
        return set()
    history = fields.get("history")
    if is_given(history):
        messages[:0] = _history(history, shape)
    own = [message["content"] for message in messages if message["role"] == "system"]
    beside = {text_of(fields[name]) for name in _SYSTEMS if is_given(fields.get(name))}
    beside = {text for text in beside if text.strip()}
    if len(beside | set(own)) > 1 and beside - set(own):
        raise RecordDropped(DropReason.TWO_SYSTEMS)
    if beside and not own:
        messages.insert(0, {"role": "system", "content": beside.pop()})
    return set(_BESIDE)


def _take_tools(fields: Mapping[str, Any], messages: Sequence[Message]) -> Any:
    """Remove from the turns their tools, and give the one list of turns and record.

    Before system turns that say nothing are left out, and others are put in front.
    """
    beside = {"role": "system", "tools": read_tools(fields.get("tools"))}
    try:
        tools = tools_of([beside, *messages])
    except TurnsError as error:
        raise RecordDropped(DropReason.BAD_TOOLS, error.short) from error
    if tools:
        for message in messages:
            message.pop("tools", None)
    return tools


def _history(history: Any, shape: Sequence[str]) -> list[Message]:
    """Earlier questions and answers, as pairs of texts."""
    if isinstance(history, str):
        raise RecordDropped(DropReason.BAD_HISTORY, "a text")
    if shape[0] in _LISTS:
        raise RecordDropped(DropReason.BAD_HISTORY, f"beside {shape[0]}")
    messages: list[Message] = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordDropped(DropReason.BAD_HISTORY, f"a {type(pair).__name__}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(read_message({"role": role, "content": text}, set()))
    return messages


def _check_roles(messages: Sequence[Message]) -> None:
    roles = {message["role"] for message in messages}
    if "text" in roles:
        if len(messages) > 1:
            raise RecordDropped(DropReason.MALFORMED, "a document among turns")
    elif "assistant" not in roles:
        raise RecordDropped(DropReason.NO_ASSISTANT)
    elif all("train" in message for message in messages if message["role"] == "assistant"):
        raise RecordDropped(DropReason.NOTHING_TO_LEARN)


def _some_names(fields: Mapping[str, Any]) -> str:
    names = sorted(map(str, fields))
    return "the fields " + ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _label(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    if not is_given(value):
        return None
    if isinstance(value, bytes):
        return text_of(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RecordDropped(DropReason.BAD_LABEL, type(value).__name__)
