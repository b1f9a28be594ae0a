"""Messages to token ids, with a mask of the tokens that the model is to learn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from slap_stream.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    pass


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

# Noncharacters of Unicode: no text that is meant for interchange holds them.
_SPAN_START, _SPAN_STOP = "\ufdd0", "\ufdd1"
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of one record.

    Attributes:
        input_ids: (tokens,) ids, special tokens of the chat template included.
        supervised: (tokens,) whether the model is to predict that token. At least one is true,
            unless `truncated`.
        truncated: Whether tokens beyond `max_length` were cut off.
    """

    input_ids: list[int]
    supervised: list[bool]
    truncated: bool


def encode(
    tokenizer: Any, messages: Sequence[Message], *, max_length: int | None = None
) -> Encoded:
    """Turn a conversation into token ids and mark what the assistant says.

    A turn's end-of-turn token is supervised, what a template writes after it (a line break) is
    not. Where a template ends the last turn with no such token (GLM's does not), the tokenizer's
    end-of-sequence token is added, or the model would never learn to stop.

    Turns are found by the template's `{% generation %}` marks where it has them. Otherwise the
    conversation is rendered up to each turn, and each rendering must be a prefix of the whole one.
    Messages of role `text` are plain documents: no template, every token supervised.

    Args:
        tokenizer: A Hugging Face tokenizer; without a chat template it gets the default one.
        messages: Dicts with `role` and `content`; at least one of role `assistant`, or all `text`.
        max_length: Tokens kept, from the start; None keeps all.

    Returns:
        Ids and mask of equal length.

    Raises:
        ConfigError: If max_length is not positive, or the tokenizer can mark no end of a turn.
        CorpusError: If the record has no assistant turn, or its turns cannot be located.
    """
    if max_length is not None and max_length < 1:
        raise ConfigError(
            f"max_length must be a positive number of tokens or None, got {max_length!r}."
        )
    roles = [message["role"] for message in messages]
    if "text" in roles:
        if any(role != "text" for role in roles):
            raise CorpusError(
                f"messages must be all of role 'text' or none, got roles {sorted(set(roles))!r}; "
                "a plain document has no turns."
            )
        input_ids = _document_ids(tokenizer, "".join(message["content"] for message in messages))
        supervised = [True] * len(input_ids)
    elif "assistant" in roles:
        text, spans = _render(tokenizer, messages)
        input_ids, supervised = _tokenize(tokenizer, text, spans)
        _end_last_turn(tokenizer, input_ids, supervised)
    else:
        raise CorpusError(
            f"messages must hold at least one turn of role 'assistant', got roles {roles[:5]!r}; "
            "there is nothing to learn from the others."
        )
    if not any(supervised):
        raise CorpusError(
            "messages must hold at least one token of an assistant, got none; "
            "all its turns are empty."
        )
    truncated = max_length is not None and len(input_ids) > max_length
    return Encoded(
        input_ids=input_ids[:max_length], supervised=supervised[:max_length], truncated=truncated
    )


def _render(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The conversation as text, and the character ranges that the assistant is to learn."""
    if tokenizer.chat_template is not None:
        template = tokenizer.get_chat_template()
    elif tokenizer.eos_token is not None:
        template = DEFAULT_CHAT_TEMPLATE
    else:
        raise ConfigError(
            "tokenizer must have a chat_template or an eos_token, got neither; "
            "without them nothing marks the end of a turn."
        )
    marked = _mark_generation(template)
    if marked is not None:
        return _split_spans(_apply(tokenizer, messages, marked))
    text = _apply(tokenizer, messages, template)
    stops = tuple(sorted(tokenizer.get_added_vocab()))
    spans: list[Span] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:turn], template, prompt=True) if turn else ""
        upto = _apply(tokenizer, messages[: turn + 1], template)
        if not text.startswith(prompt):
            raise CorpusError(
                f"tokenizer.chat_template must render the first {turn} messages as a prefix of "
                "all of them; it does not, so that the assistant's tokens cannot be located: add "
                "{% generation %} marks to the template."
            )
        if text.startswith(upto):
            spans.append((len(prompt), _turn_end(text, len(upto), stops)))
        else:
            spans.append(_find_content(text, len(prompt), message["content"], turn, stops))
    return text, spans


def _apply(
    tokenizer: Any, messages: Sequence[Message], template: str, *, prompt: bool = False
) -> str:
    # Templates call raise_exception for conversations that they do not know, a system turn, say.
    from jinja2.exceptions import TemplateError

    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise CorpusError(
            f"messages must fit the tokenizer's chat template, got roles "
            f"{[message['role'] for message in messages][:5]!r}; it says: {error}"
        ) from error
    return rendered


@lru_cache(maxsize=16)
def _mark_generation(template: str) -> str | None:
    """The template with its `generation` blocks turned into marks in the text, None without any.

    Reading the marks gives exact character ranges. Hugging Face's own mask goes by token lookup,
    which loses turns that start or end with a blank.
    """

    def mark(tag: re.Match[str]) -> str:
        left, end, right = tag.groups()
        # An `if` block, because whitespace control treats blocks unlike expressions.
        sign = _SPAN_STOP if end else _SPAN_START
        return f"{{%{left} if true %}}{sign}{{% endif {right}%}}"

    marked, count = _GENERATION_TAG.subn(mark, template)
    return marked if count else None


def _split_spans(marked: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    position = 0
    for index, piece in enumerate(re.split(f"[{_SPAN_START}{_SPAN_STOP}]", marked)):
        if index % 2:
            spans.append((position, position + len(piece)))
        pieces.append(piece)
        position += len(piece)
    signs = re.findall(f"[{_SPAN_START}{_SPAN_STOP}]", marked)
    if signs != [_SPAN_START, _SPAN_STOP] * len(spans):
        raise CorpusError(
            "messages must not hold the noncharacters U+FDD0 and U+FDD1, which mark turns here; "
            "remove them from the corpus."
        )
    return "".join(pieces), spans


def _turn_end(text: str, stop: int, stops: tuple[str, ...]) -> int:
    # What follows the end-of-turn token (a line break) is never generated.
    stripped = text[:stop].rstrip()
    return len(stripped) if stops and stripped.endswith(stops) else stop


def _find_content(text: str, start: int, content: str, turn: int, stops: tuple[str, ...]) -> Span:
    """Range of a turn that the template writes otherwise when others follow it.

    Qwen3, for one, writes an empty thinking block only into the last turn.
    """
    begin = len(text) - len(text[start:].lstrip())
    if not text.startswith(content.strip(), begin):
        raise CorpusError(
            f"tokenizer.chat_template must render the first {turn + 1} messages as a prefix of "
            "all of them, or a turn's content unchanged; it does neither, so that the assistant's "
            "tokens cannot be located: add {% generation %} marks to the template."
        )
    end = begin + len(content.strip())
    following = max((s for s in stops if text.startswith(s, end)), key=len, default="")
    return start, end + len(following)


def _tokenize(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Ids of the text, and whether each holds a character of a span."""
    if not tokenizer.is_fast:
        return _tokenize_by_prefix(tokenizer, text, spans)
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    inside = bytearray(len(text))
    for start, stop in spans:
        inside[start:stop] = b"\x01" * (stop - start)
    # A byte-level tokenizer trims blanks from its offsets: a token of blanks alone is the empty
    # range at their end, and belongs to the character before it.
    supervised = [
        1 in inside[min(start, max(stop - 1, 0)) : stop]
        for start, stop in encoding["offset_mapping"]
    ]
    return list(encoding["input_ids"]), supervised


def _tokenize_by_prefix(
    tokenizer: Any, text: str, spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """The same without offsets: ids of a prefix of the text must be a prefix of its ids."""

    def ids_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    input_ids = ids_of(text)
    supervised = [False] * len(input_ids)
    for start, stop in spans:
        before, upto = ids_of(text[:start]), ids_of(text[:stop])
        if input_ids[: len(before)] != before or input_ids[: len(upto)] != upto:
            raise CorpusError(
                "tokenizer must split the text at the borders of turns, and this slow one does "
                "not; use its fast version (use_fast=True), which reports where tokens lie."
            )
        supervised[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return input_ids, supervised


def _end_last_turn(tokenizer: Any, input_ids: list[int], supervised: list[bool]) -> None:
    """Add the end-of-sequence token if the last token is the assistant's and ends nothing."""
    eos = tokenizer.eos_token_id
    if eos is None or not supervised or not supervised[-1]:
        return
    if input_ids[-1] != eos and input_ids[-1] not in tokenizer.get_added_vocab().values():
        input_ids.append(eos)
        supervised.append(True)


def _document_ids(tokenizer: Any, text: str) -> list[int]:
    input_ids = list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    # An end mark, so that the model learns where documents stop.
    if eos is not None and input_ids[-1:] != [eos]:
        input_ids.append(eos)
    return input_ids
