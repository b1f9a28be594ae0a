"""Near-copies of a record, such as editors and scrapes make."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def near_copy(record: Record, number: int, rng: random.Random) -> Record:
    """The same record with a few small edits of its questions, such as editors and scrapes make."""
    messages = []
    for turn in record["messages"]:
        content = turn["content"]
        if turn["role"] != "assistant" or rng.random() < 0.2:
            for _ in range(rng.randint(1, 2)):
                content = rng.choice(_EDITS)(content, rng)
        messages.append({"role": turn["role"], "content": content})
    return {
        "id": f"{record['id']}-{number}",
        "source": record["source"],
        "messages": messages,
        "kind": "copy",
    }


def _drop_word(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    if len(words) > 3:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def _swap_words(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    if len(words) > 2:
        at = rng.randrange(len(words) - 1)
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def _lower(text: str, rng: random.Random) -> str:
    return text[:1].lower() + text[1:]


def _end(text: str, rng: random.Random) -> str:
    return text.rstrip(" .!?") + rng.choice(["", ".", "!", " ."])


def _double_space(text: str, rng: random.Random) -> str:
    return text.replace(" ", "  ", 1)


_EDITS: tuple[Callable[[str, random.Random], str], ...] = (
    _drop_word,
    _swap_words,
    _lower,
    _end,
    _double_space,
)
