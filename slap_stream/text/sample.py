"""One sample as prompt and target text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slap_stream.text.chat import ATTENTION
from slap_stream.text.turns import is_learnt, tools_of

CHARACTERS_PER_TOKEN = 4
_TOLD = ("reasoning_content", "content")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSample:
    """One sample as the encoders see it.

    Attributes:
        prompt: What the model is given, tools too; of plain text, its first half.
        target: What the model is trained to say; of plain text, its second half.
        length: Tokens if the corpus is tokenised, else characters / 4, rounded up; at least one.
        source: Name of its source, or None if the corpus has none.
        messages: Chat turns from which a reference model's tokens are made; None if tokenised.
        input_ids: (tokens,) int32 of a tokenised corpus, else None.
        supervised: (tokens,) bool of a tokenised corpus, else None.
    """

    prompt: str
    target: str
    length: int
    source: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    input_ids: np.ndarray[Any, np.dtype[np.int32]] | None = None
    supervised: np.ndarray[Any, np.dtype[np.bool_]] | None = None

    @property
    def text(self) -> str:
        """Prompt and target in one string."""
        return f"{self.prompt}\n{self.target}" if self.prompt else self.target


def halves(text: str) -> tuple[str, str]:
    """Cut a text near its middle, at white space if there is some in the second quarter.

    Plain text has no prompt; that its second half follows from its first stands in for that the
    target follows from the prompt.
    """
    middle = (len(text) + 1) // 2
    space = text.rfind(" ", middle // 2, middle)
    cut = space + 1 if space >= 0 else middle
    return text[:cut], text[cut:]


def _characters(count: int) -> int:
    return max(1, -(-count // CHARACTERS_PER_TOKEN))


def from_messages(messages: Sequence[Mapping[str, Any]], source: str | None) -> TextSample:
    """A sample from chat turns: those of the assistant that are learnt are the target, with what
    it thinks and, as JSON, which tools it calls; the tools, likewise, and the others are the
    prompt.
    """
    if len(messages) == 1 and messages[0]["role"] == "text":
        return from_text(messages[0]["content"], source)
    told: dict[bool, list[str]] = {False: [], True: []}
    if tools := tools_of(messages):
        # Spelt as most templates spell them.
        told[False].append(json.dumps(tools, ensure_ascii=False, default=str))
    for turn in messages:
        learnt = turn["role"] == "assistant" and is_learnt(turn)
        told[learnt] += [turn[name] for name in _TOLD if turn.get(name)]
        if calls := turn.get("tool_calls"):
            told[learnt].append(json.dumps(calls, ensure_ascii=False, default=str))
    prompt, target = "\n".join(told[False]), "\n".join(told[True])
    length = sum(len(text) for text in (*told[False], *told[True]))
    return TextSample(
        prompt=prompt, target=target, length=_characters(length), source=source, messages=messages
    )


def from_text(text: str, source: str | None) -> TextSample:
    """A sample from plain text, all of it target; see `halves`."""
    prompt, target = halves(text)
    return TextSample(
        prompt=prompt,
        target=target,
        length=_characters(len(text)),
        source=source,
        messages=[{"role": "text", "content": text}],
    )


def from_tokens(
    sample: Mapping[str, Any], source: str | None, decode: Callable[[Any], str]
) -> TextSample:
    """A sample from `input_ids` and, unless all are, `supervised`; padding is left out."""
    input_ids = np.asarray(sample["input_ids"], dtype=np.int32).reshape(-1)
    marks, shown = sample.get("supervised"), sample.get(ATTENTION)
    supervised = np.ones(len(input_ids), dtype=np.bool_)
    if marks is not None:
        supervised = np.asarray(marks).reshape(-1).astype(np.bool_)
    if shown is not None:
        attended = np.asarray(shown).reshape(-1).astype(np.bool_)
        input_ids, supervised = input_ids[attended], supervised[attended]
    if supervised.all():
        prompt, target = halves(decode(input_ids))
    else:
        prompt, target = decode(input_ids[~supervised]), decode(input_ids[supervised])
    return TextSample(
        prompt=prompt,
        target=target,
        length=max(1, len(input_ids)),
        source=source,
        input_ids=input_ids,
        supervised=supervised,
    )
