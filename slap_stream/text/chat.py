"""Messages to token ids, with a mask of the tokens that the model is to learn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from slap_stream.errors import ConfigError
from slap_stream.text.template import DEFAULT_CHAT_TEMPLATE, Message, TurnsError
from slap_stream.text.turns import Span, find_turns, is_learnt

__all__ = [
    "ATTENTION",
    "DEFAULT_CHAT_TEMPLATE",
    "Encoded",
    "Truncate",
    "check_truncate",
    "cut",
    "encode",
    "without_padding",
]

ATTENTION = "attention_mask"

Truncate = Literal["right", "left", "drop"]
"""What becomes of a record that is longer than max_length: its start is kept, its end, or none."""

# How byte-level tokenizers spell a blank.
_BLANK = "\u0120"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids of one record.

    Attributes:
        input_ids: (tokens,) ids, special tokens of the chat template included.
        supervised: (tokens,) whether the model is to predict that token. At least one is true,
            unless `truncated`.
        truncated: Whether tokens beyond `max_length` were cut off.
        shared: Turns whose first token also holds the end of what stands before them.
    """

    input_ids: list[int]
    supervised: list[bool]
    truncated: bool
    shared: int = 0


def check_truncate(truncate: Any, max_length: int | None) -> None:
    """Refuse an unknown way to truncate, or one that never comes to bear.

    Raises:
        ConfigError: If it is either.
    """
    if truncate not in get_args(Truncate):
        raise ConfigError(
            f"truncate must be one of {', '.join(get_args(Truncate))}, got {truncate!r}."
        )
    if truncate != "right" and max_length is None:
        raise ConfigError(
            f"truncate must be 'right' without max_length, got {truncate!r}; nothing is too long."
        )


def without_padding(sample: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """Ids of a tokenised record, and whether each is learnt, as far as they are attended to.

    Args:
        sample: `input_ids`; `supervised` unless all are; `attention_mask` if there is padding.
    """
    ids = [int(token) for token in sample["input_ids"]]
    marks, shown = sample.get("supervised"), sample.get(ATTENTION)
    supervised = [True] * len(ids) if marks is None else [bool(mark) for mark in marks]
    if shown is None:
        return ids, supervised
    rows = zip(ids, supervised, shown, strict=True)
    kept = [(token, mark) for token, mark, attended in rows if attended]
    return [token for token, _ in kept], [mark for _, mark in kept]


def cut(
    record: Encoded, tokenizer: Any, max_length: int | None, truncate: Truncate
) -> Encoded | None:
    """Truncate a record to at most `max_length` tokens; None if it is rather left out.

    Of the end that "left" keeps, the token of the beginning goes with it, where there is one:
    models are hardly ever shown a text without.
    """
    excess = len(record.input_ids) - (max_length or len(record.input_ids))
    if excess <= 0:
        return record
    if truncate == "drop":
        return None
    ids, supervised = record.input_ids, record.supervised
    if truncate == "right":
        ids, supervised = ids[:max_length], supervised[:max_length]
    else:
        head = int(ids[0] == tokenizer.bos_token_id and not supervised[0])
        tail = head + excess
        ids, supervised = ids[:head] + ids[tail:], supervised[:head] + supervised[tail:]
    return replace(record, input_ids=ids, supervised=supervised, truncated=True)


def encode(
    tokenizer: Any, messages: Sequence[Message], *, max_length: int | None = None
) -> Encoded:
    """Turn a conversation into token ids and mark what the assistant says.

    Supervised are the assistant's turns, from what follows the generation prompt (so that the
    thinking that a template writes is learnt, the header is not) to the token that ends the turn,
    and not what a template writes after that (a line break). Where a template ends the last turn
    with no token (GLM's does not), the tokenizer's end-of-sequence token is added, or the model
    would never learn to stop. A template's `{% generation %}` marks are used where they stand.

    A turn may say `train: false` or `weight: 0`: it is read and not learnt. `reasoning_content`,
    and `tools` on a message before the first answer, are given to a template that writes them.

    A token that holds characters of a turn is supervised. An answer that begins with blanks may
    share its first token with the header ("\\n\\n", where a prompt at inference ends in "\\n"):
    `shared` counts them.

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
    shared = 0
    if "text" in roles:
        if any(role != "text" for role in roles):
            raise TurnsError(
                f"messages must be all of role 'text' or none, got roles {sorted(set(roles))!r}; "
                "a plain document has no turns.",
                "a plain document among turns",
            )
        input_ids = _document_ids(tokenizer, "".join(message["content"] for message in messages))
        supervised = [True] * len(input_ids)
    elif not any(m["role"] == "assistant" and is_learnt(m) for m in messages):
        raise TurnsError(
            f"messages must hold at least one turn of role 'assistant' that is to be learnt, got "
            f"roles {roles[:5]!r}; there is nothing to learn from the others.",
            "no turn to learn",
        )
    else:
        turns = find_turns(tokenizer, messages)
        input_ids, supervised, shared = _tokenize(tokenizer, turns.text, turns.spans)
        if turns.open_ended and any(supervised):
            if tokenizer.eos_token_id is None:
                raise ConfigError(
                    "tokenizer must have an eos_token, or a chat_template that ends turns with a "
                    "token, got neither; the model would never learn to stop."
                )
            input_ids.append(tokenizer.eos_token_id)
            supervised.append(True)
    if not any(supervised):
        raise TurnsError(
            "messages must hold at least one token of an assistant, got none; "
            "all its turns are empty.",
            "empty turns",
        )
    truncated = max_length is not None and len(input_ids) > max_length
    return Encoded(
        input_ids=input_ids[:max_length],
        supervised=supervised[:max_length],
        truncated=truncated,
        shared=shared,
    )


def _tokenize(
    tokenizer: Any, text: str, spans: Sequence[Span]
) -> tuple[list[int], list[bool], int]:
    """Ids of the text, whether each holds a character of a span, and how many spans share one."""
    if not tokenizer.is_fast:
        return *_tokenize_by_prefix(tokenizer, text, spans), 0
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    input_ids: list[int] = list(encoding["input_ids"])
    offsets: list[Span] = encoding["offset_mapping"]
    stops = [stop for _, stop in offsets]
    supervised = [False] * len(input_ids)
    shared = 0
    for start, stop in spans:
        token = bisect_right(stops, start)
        # Tokens at the border that seem to lie before it: without characters, or trimmed.
        while token and stops[token - 1] == start == offsets[token - 1][0]:
            token -= 1
        token = max(token - 1, 0)
        while token < len(offsets):
            first, last = offsets[token]
            if first <= start or last >= stop:
                first, last = _extent(tokenizer, input_ids[token], text, first, last)
                if first >= stop and offsets[token][0] >= stop:
                    break
            # A token without characters (a leading blank that the tokenizer made up) belongs to
            # what follows it.
            if first < stop and (last > start or first == last == start):
                supervised[token] = True
                if first < start:
                    supervised[token], more = _straddling(
                        tokenizer, input_ids[token], text[first:start], text[start]
                    )
                    shared += more
            token += 1
    return input_ids, supervised, shared


def _extent(tokenizer: Any, token_id: int, text: str, start: int, stop: int) -> Span:
    """Characters of a token, with the blanks that byte-level tokenizers trim from its range."""
    spelt: str = tokenizer.convert_ids_to_tokens(token_id)
    missing = len(spelt) - len(text[start:stop].encode())
    if missing <= 0 or _BLANK not in spelt:
        return start, stop
    before = len(spelt) - len(spelt.lstrip(_BLANK))
    # A token of blanks alone is the empty range at their end.
    before = min(before, missing)
    after = min(len(spelt) - len(spelt.rstrip(_BLANK)), missing - before)
    return start - before, stop + after


def _straddling(tokenizer: Any, token_id: int, before: str, first: str) -> tuple[bool, bool]:
    """Of a token that begins before a turn: whether it is learnt, and whether that is told."""
    if before.strip() and token_id in tokenizer.added_tokens_decoder:
        # Phi-3's header swallows the blanks that follow it, an answer's own ones too.
        return False, True
    # "▁answer" after a template's blank is how the model begins an answer.
    return True, bool(before.strip()) or first.isspace()


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
            raise TurnsError(
                "tokenizer must split the text at the borders of turns, and this slow one does "
                "not; use its fast version (use_fast=True), which reports where tokens lie.",
                "a slow tokenizer that does not split the text at the borders of turns",
            )
        supervised[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return input_ids, supervised


def _document_ids(tokenizer: Any, text: str) -> list[int]:
    input_ids = list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    # An end mark, so that the model learns where documents stop.
    if eos is not None and input_ids[-1:] != [eos]:
        input_ids.append(eos)
    return input_ids
