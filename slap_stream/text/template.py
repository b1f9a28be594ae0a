"""A tokenizer's chat template: conversations written by it, and what it writes around turns."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from slap_stream.errors import ConfigError, CorpusError
from slap_stream.text.traced import Mark, traced, unmark

logger = logging.getLogger(__name__)

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Template of a tokenizer that has none; put it on the tokenizer to generate with the same one."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of what an assistant thinks before it answers; templates differ in which they read."""

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """What a template writes around the turns of the assistant.

    Attributes:
        prompt: The generation prompt, or its end; empty if there is none.
        headers: What else may stand before an answer, the last one and an earlier one.
        ends: What ends a turn, one token or some; none if the next turn's header does.
    """

    prompt: str
    headers: tuple[str, ...]
    ends: tuple[str, ...]


class TurnsError(CorpusError):
    """This record cannot be learnt from.

    Attributes:
        short: Why, in some words that are the same for all records of the kind.
    """

    def __init__(self, message: str, short: str) -> None:
        super().__init__(message)
        self.short = short


def not_located(why: str) -> TurnsError:
    """The error of a template that hides where a turn lies, for what it does."""
    return TurnsError(
        f"tokenizer.chat_template must write each turn of the assistant where it can be located; "
        f"{why}: add {{% generation %}} marks to the template.",
        f"a turn cannot be located, {why}",
    )


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """The template that writes the tokenizer's conversations.

    Raises:
        ConfigError: If nothing would mark the end of a turn.
    """
    if tokenizer.chat_template is not None:
        template: str = tokenizer.get_chat_template(tools=tools)
        return template
    if tokenizer.eos_token is None:
        raise ConfigError(
            "tokenizer must have a chat_template or an eos_token, got neither; "
            "without them nothing marks the end of a turn."
        )
    _tell_of_default()
    return DEFAULT_CHAT_TEMPLATE


@cache
def _tell_of_default() -> None:
    """Once a process: a model that is asked in another format later has not learnt to answer."""
    logger.warning(
        "the tokenizer has no chat_template: turns are written as %r; put the one that you will "
        "generate with on the tokenizer, or slap_stream.text.chat.DEFAULT_CHAT_TEMPLATE.",
        "<|user|>\n...\n<|assistant|>\n...",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """A template and all that it writes besides messages."""

    tokenizer: Any
    template: str
    tools: Any = None

    def plain(self, shown: Sequence[Message], template: str) -> str:
        """As everybody else's code writes it."""
        with _explained(shown):
            text: str = self.tokenizer.apply_chat_template(
                list(shown), tools=self.tools, chat_template=template, tokenize=False
            )
        return text

    def marked(
        self, shown: Sequence[Message], *, inside: bool = False, prompt: bool = False
    ) -> tuple[str, list[Mark]]:
        """The same text, and where each message lies in it."""
        # The public way makes plain strings of traced ones.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        messages = [
            {"role": message["role"]}
            | traced({k: v for k, v in message.items() if k != "role"}, turn, inside=inside)
            for turn, message in enumerate(shown)
        ]
        with _explained(shown):
            return unmark(
                _compile_jinja_template(self.template).render(
                    messages=messages,
                    tools=self.tools,
                    documents=None,
                    add_generation_prompt=prompt,
                    **self.tokenizer.special_tokens_map,
                )
            )


class _explained:
    """Say of what a template raises that it is the record's fault, and what it says."""

    def __init__(self, shown: Sequence[Message]) -> None:
        self._roles = [message["role"] for message in shown][:5]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from jinja2.exceptions import TemplateError

        # Templates call raise_exception for conversations that they do not know, a system turn,
        # say; what they add up or look up that is not there raises as it does in Python.
        if isinstance(error, TemplateError | TypeError | ValueError | LookupError):
            raise TurnsError(
                f"messages must fit the tokenizer's chat template, got roles {self._roles!r}; "
                f"it says: {error}",
                str(error),
            ) from error


_styles: WeakKeyDictionary[Any, dict[Any, Style]] = WeakKeyDictionary()


def find_style(writer: Writer) -> Style:
    """What the template writes around turns, found by trying; once for each template."""
    known = _styles.setdefault(writer.tokenizer, {})
    # A tokenizer may be given other special tokens, or further ones, at any time.
    key = (writer.template, repr(writer.tokenizer.special_tokens_map), len(writer.tokenizer))
    if key not in known:
        known[key] = _try_out(Writer(tokenizer=writer.tokenizer, template=writer.template))
    return known[key]


def _try_out(writer: Writer) -> Style:
    tokens = {*writer.tokenizer.get_added_vocab(), writer.tokenizer.eos_token} - {None, ""}
    system: Message = {"role": "system", "content": "one"}
    user: Message = {"role": "user", "content": "two"}
    assistant: Message = {"role": "assistant", "content": "three"}

    def following(*turns: Message) -> list[str]:
        """The tokens right after the first turn of the assistant."""
        tail = _after(writer, turns, turns.index(assistant)).lstrip()
        found: list[str] = []
        while fitting := [token for token in tokens if tail.startswith(token)]:
            found.append(max(fitting, key=len))
            tail = tail.removeprefix(found[-1])
        return found

    head: list[Message]
    for head in ([], [system]):
        try:
            at_end = following(*head, user, assistant)
        except TurnsError as error:
            failure = error
        else:
            break
    else:
        raise failure
    asked = len(head)
    without = _after(writer, [*head, user], asked)
    prompt = _after(writer, [*head, user], asked, prompt=True)
    # Phi-3.5 writes an end of text in the place of a generation prompt.
    prompt = prompt[next(_differences(without, prompt), min(len(without), len(prompt))) :]
    headers = [_between(writer, [*head, user, assistant], asked).removeprefix(without)]
    # Two turns in a row may not be of this template's world, nor a user's after an answer.
    inside, doubled = at_end, list[str]()
    with suppress(TurnsError):
        inside = following(*head, user, assistant, user)
        headers += [_between(writer, [*head, user, assistant, user], asked).removeprefix(without)]
    with suppress(TurnsError):
        doubled = following(*head, user, assistant, assistant)
    return Style(
        prompt=prompt,
        headers=tuple(filter(None, headers)),
        ends=_ends(at_end, inside, doubled, prompt),
    )


def _ends(at_end: list[str], inside: list[str], doubled: list[str], prompt: str) -> tuple[str, ...]:
    """What ends a turn, of the tokens that follow the last turn, one before a user's, one before
    another of the assistant.
    """
    if at_end[:1] == inside[:1]:
        # Cohere ends its turns with two tokens. A header may follow at once, though, also at the
        # end (Llama 3's first template writes one always).
        count = 1 if at_end else 0
        while prompt and count and at_end[count : count + 1] == inside[count : count + 1] != []:
            if at_end[count] in prompt:
                break
            count += 1
        return ("".join(at_end[:count]),) if count else ()
    # What stands before the next turn ends this one (gpt-oss's <|end|>) only if it does not depend
    # on whose turn is next. Else it is that turn's header (GLM's <|user|>).
    if doubled[:1] == at_end[:1]:
        return ()
    inner = inside[:1] if inside[:1] == doubled[:1] and "".join(inside[:1]) not in prompt else []
    return (*at_end[:1], *inner)


def _after(writer: Writer, shown: Sequence[Message], turn: int, *, prompt: bool = False) -> str:
    """What is written after this turn."""
    text, marks = writer.marked(shown, prompt=prompt)
    mine = [mark.position for mark in marks if mark.owner == turn]
    if not mine:
        raise not_located("it leaves a turn out")
    return text[mine[-1] :]


def _between(writer: Writer, shown: Sequence[Message], turn: int) -> str:
    """What is written between this turn and the next."""
    text, marks = writer.marked(shown)
    mine = [mark.position for mark in marks if mark.owner == turn]
    theirs = [mark.position for mark in marks if mark.owner == turn + 1]
    return text[mine[-1] : theirs[0]]


def _differences(left: str, right: str) -> Iterator[int]:
    return (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
