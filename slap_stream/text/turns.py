"""Where a chat template puts what the assistant says, to the character.

The conversation is written twice: with plain strings, which is the text, and with traced ones
(`traced.py`), which says where each message lies in it. Both must be the same text, or the record
is refused. What stands before and after a turn is known from the template alone (`template.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from slap_stream.text.template import (
    REASONING_FIELDS,
    Message,
    Style,
    TurnsError,
    Writer,
    find_style,
    not_located,
    template_of,
)
from slap_stream.text.traced import (
    BLOCK_START,
    BLOCK_STOP,
    MAX_OWNERS,
    RESERVED,
    START,
    STOP,
    Mark,
)

LEARN_FIELDS = ("train", "training", "loss", "weight")
"""Names under which a turn says whether it is to be learnt."""

_RESERVED = re.compile(f"[{''.join(sorted(RESERVED))}]")
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")

# A word that no corpus holds, and that is the same in JSON and in Python's spelling.
_PROBE = "slapStreamProbe7e3f"

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """A conversation as text.

    Attributes:
        text: As the template writes it; if `open_ended`, up to the end of the last turn.
        spans: Half-open ranges of characters that are to be learnt, in order.
        open_ended: Whether the last turn is to be learnt and the template ends it by no token.
    """

    text: str
    spans: list[Span]
    open_ended: bool


def is_learnt(message: Message) -> bool:
    """Whether a turn of the assistant is to be learnt: unless it says `train: false`, `weight: 0`.

    Raises:
        TurnsError: If it says neither yes nor no.
    """
    for name in LEARN_FIELDS:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise TurnsError(
                f"{name} of a turn must be true, false, 0 or 1, got {value!r}; a turn is learnt or "
                "it is not.",
                f"turn with the {name} {value!r}",
            )
    return all(message.get(name) in (None, 1) for name in LEARN_FIELDS)


def tools_of(messages: Sequence[Message]) -> Any:
    """The tools of a conversation, from a turn before its first answer; None for none.

    A template is given tools for the whole conversation, so those that come later, or that change,
    would be shown where they were not known yet.

    Raises:
        TurnsError: If lists differ, or the only one stands later.
    """
    tools, answered = None, False
    for message in messages:
        answered = answered or message["role"] == "assistant"
        own = message.get("tools")
        if not own or own == tools:
            continue
        if tools is not None or answered:
            which = "a list after the first answer" if tools is None else "two lists that differ"
            raise TurnsError(
                f"tools of a conversation must be one list before its first answer, got {which}; "
                "put those of all turns on the first message.",
                which,
            )
        tools = own
    return tools


def find_turns(tokenizer: Any, messages: Sequence[Message]) -> Turns:
    """Write a conversation as text and find what is to be learnt in it.

    A turn goes from the end of the generation prompt, or from its own first character where the
    template writes that prompt otherwise, to the token that ends it. Where a template has
    `{% generation %}` marks, they say what is learnt. Turns with `train: false` are not.

    Args:
        tokenizer: A Hugging Face tokenizer; without a chat template it gets the default one.
        messages: With a turn of role `assistant`. One before it may hold `tools`.

    Raises:
        ConfigError: If the tokenizer can mark no end of a turn.
        TurnsError: If the template refuses the messages, a turn cannot be located, tools stand
            where they cannot be used, or the template writes no tools or no thoughts.
    """
    tools = tools_of(messages)
    template = template_of(tokenizer, tools)
    marked = _mark_generation(template)
    writer = Writer(
        tokenizer=tokenizer, template=template if marked is None else marked, tools=tools
    )
    shown = [_shown(message) for message in messages]
    learnt = [message["role"] == "assistant" and is_learnt(message) for message in messages]
    text, marks = _written(writer, shown, template)
    _check_nothing_is_lost(writer, shown, template)
    if marked is not None:
        spans = _blocks(marks, learnt, [message["role"] for message in messages])
        return _close_block(text, marks, spans, last_is_learnt=learnt[-1])

    style = find_style(writer)
    events = _events(marks)
    spans, open_ended = [], False
    for turn in [turn for turn, wanted in enumerate(learnt) if wanted]:
        start, stop, ended = _turn(text, marks, events, style, messages, turn)
        if turn == len(messages) - 1 and not ended:
            # What a template writes behind an answer that it does not end is never generated.
            text, open_ended = text[:stop], True
        spans.append((start, stop))
    return Turns(text=text, spans=spans, open_ended=open_ended)


def _check_nothing_is_lost(writer: Writer, shown: Sequence[Message], template: str) -> None:
    """Refuse tools and thoughts that the template passes over.

    That it names them says little (`enable_thinking`), nor does that their texts are there, which
    may stand there anyway. So another text is put in their place, and looked for.

    Raises:
        TurnsError: If tools are not written, or no thought is, were its turn the last.
    """
    if writer.tools:
        other = replace(writer, tools=[_with_name(tool) for tool in writer.tools])
        if _PROBE not in other.plain(shown, template):
            raise _unwritten("tools")
    thinking = [turn for turn, message in enumerate(shown) if _thought(message)]
    if not thinking:
        return
    probes = [_with_thought(message) for message in shown]
    # Templates leave out what was thought before the last question.
    for stop in dict.fromkeys((len(shown), *(turn + 1 for turn in reversed(thinking)))):
        # A template may refuse a conversation that stops there.
        with suppress(TurnsError):
            if _PROBE in writer.plain(probes[:stop], template):
                return
    raise _unwritten("reasoning_content")


def _unwritten(name: str) -> TurnsError:
    return TurnsError(
        f"tokenizer.chat_template must write {name!r} where messages hold it, and it writes none; "
        f"use the template of a model that knows it, or take {name!r} out of the corpus.",
        f"{name}, which the template does not write",
    )


def _with_name(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "name": _PROBE}}
    return {**tool, "name": _PROBE}


def _with_thought(message: Message) -> Message:
    return {**message, **dict.fromkeys(REASONING_FIELDS, _PROBE)} if _thought(message) else message


def _shown(message: Message) -> dict[str, Any]:
    """What a template is shown of a message: what it says, not what we are to do with it."""
    shown = {
        name: value
        for name, value in message.items()
        if value is not None and name not in LEARN_FIELDS and name != "tools"
    }
    thought = _thought(message)
    if thought is not None:
        shown |= dict.fromkeys(REASONING_FIELDS, thought)
    return shown


def _thought(message: Message) -> Any:
    return next((message[name] for name in REASONING_FIELDS if message.get(name)), None)


def _name(call: Any) -> str:
    return str((call.get("function") or call).get("name"))


def _written(writer: Writer, shown: Sequence[Message], template: str) -> tuple[str, list[Mark]]:
    if len(shown) > MAX_OWNERS:
        raise TurnsError(
            f"messages must be at most {MAX_OWNERS}, got {len(shown)}.", "too many messages"
        )
    text = writer.plain(shown, template)
    if _RESERVED.search(text):
        raise TurnsError(
            "messages must not hold the noncharacters U+FDD0 to U+FDD3, which mark turns here; "
            "remove them from the corpus.",
            "noncharacters",
        )
    for inside in (False, True):
        found, marks = writer.marked(shown, inside=inside)
        if found == text:
            return text, marks
    raise not_located("a template must write texts out as they are, or cut them")


@lru_cache(maxsize=16)
def _mark_generation(template: str) -> str | None:
    """The template with its `generation` blocks turned into marks in the text, None without any.

    Reading the marks gives exact character ranges. Hugging Face's own mask goes by token lookup,
    which loses turns that start or end with a blank.
    """

    def mark(tag: re.Match[str]) -> str:
        left, end, right = tag.groups()
        # An `if` block, because whitespace control treats blocks unlike expressions.
        sign = BLOCK_STOP if end else BLOCK_START
        return f"{{%{left} if true %}}{sign}{{% endif {right}%}}"

    marked, count = _GENERATION_TAG.subn(mark, template)
    return marked if count else None


def _blocks(marks: Sequence[Mark], learnt: Sequence[bool], roles: Sequence[str]) -> list[Span]:
    """Ranges of the template's own blocks, but for those of turns that are not to be learnt."""
    spans: list[Span] = []
    owners: set[int] = set()
    found: set[int] = set()
    start = None
    for mark in marks:
        if mark.kind == BLOCK_START and start is None:
            start, owners = mark.position, set()
        elif mark.kind == BLOCK_STOP and start is not None:
            found |= owners
            wanted = {learnt[owner] for owner in owners}
            if len(wanted) > 1:
                raise not_located("a block holds a turn that is learnt and one that is not")
            if wanted != {False}:
                spans.append((start, mark.position))
            start = None
        elif mark.kind in (BLOCK_START, BLOCK_STOP):
            raise not_located("its generation blocks lie in each other")
        elif start is not None:
            owners.add(mark.owner)
    silent = {n for n, role in enumerate(roles) if role == "assistant" and not learnt[n]}
    if silent - found:
        raise not_located("a turn that is not to be learnt lies in no block")
    return spans


def _close_block(
    text: str, marks: Sequence[Mark], spans: list[Span], *, last_is_learnt: bool
) -> Turns:
    """Find out if the last block ends its turn."""
    open_ended = False
    if spans and last_is_learnt:
        start, stop = spans[-1]
        inside = (m.position for m in marks if m.owner >= 0 and start <= m.position <= stop)
        said = max(inside, default=start)
        if said == stop and not text[stop:].strip():
            text, open_ended = text[:stop], True
    return Turns(text=text, spans=spans, open_ended=open_ended)


Events = list[int]


def _events(marks: Sequence[Mark]) -> dict[int, Events]:
    """Places in `marks` of each owner's marks."""
    events: dict[int, Events] = {}
    for place, mark in enumerate(marks):
        events.setdefault(mark.owner, []).append(place)
    return events


def _turn(
    text: str,
    marks: Sequence[Mark],
    events: Mapping[int, Events],
    style: Style,
    messages: Sequence[Message],
    turn: int,
) -> tuple[int, int, bool]:
    """Range of one turn, and whether a token ends it."""
    mine = events.get(turn, [])
    if not mine:
        raise not_located("it leaves a turn out")
    if len(mine) != mine[-1] - mine[0] + 1:
        raise not_located("it mixes a turn with others")
    first, last = marks[mine[0]], marks[mine[-1]]
    before = marks[mine[0] - 1].position if mine[0] else 0
    after = marks[mine[-1] + 1].position if mine[-1] + 1 < len(marks) else len(text)
    calls = messages[turn].get("tool_calls")
    start = _start(text, before, first, style, more=calls or _thought(messages[turn]))
    found = [(at, end) for end in style.ends if (at := text.find(end, last.position, after)) >= 0]
    if last.kind != STOP and not found:
        raise not_located("it cuts off how a turn ends")
    if not found:
        if calls:
            raise not_located("it ends a tool call by no token of a turn")
        return start, last.position, False
    at, end = min(found)
    if not calls and text[last.position : at].strip():
        raise not_located("it adds to what the assistant says")
    if calls:
        # A tool's answer that is written as JSON has no marks, and would pass for part of the call.
        if turn + 1 < len(messages) and turn + 1 not in events:
            raise not_located("it writes a tool's answer in another form")
        if any(_name(call) not in text[start:at] for call in calls):
            raise not_located("it leaves a tool call out")
    return start, at + len(end), True


def _start(text: str, before: int, first: Mark, style: Style, *, more: Any) -> int:
    """Where a turn begins; `more` if it may begin with what is not of its texts, `<think>` say."""
    at = text.rfind(style.prompt, before, first.position) if style.prompt else -1
    if at >= 0:
        return at + len(style.prompt)
    if not more and first.kind == START:
        return first.position
    for header in style.headers:
        at = text.rfind(header, before, first.position)
        if at >= 0:
            return at + len(header)
    raise not_located("it begins a turn in another way than others")
