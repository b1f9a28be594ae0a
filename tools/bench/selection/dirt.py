"""Mixed dirt: what goes wrong with the answers of a corpus, labelled by kind for scoring."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.bench.selection.copies import near_copy

Record = dict[str, Any]

# Copies of a record that is copied, and words that an answer must have to be worth spoiling.
COPIES_EACH = 4
LONG_ENOUGH = 4


def answers(record: Record) -> list[str]:
    """What the assistant says, turn by turn."""
    return [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]


def with_answers(messages: list[dict[str, str]], given: Sequence[str]) -> list[dict[str, str]]:
    """The same questions with other answers, from the first on, as many as are needed."""
    result, number = [], 0
    for turn in messages:
        if turn["role"] == "assistant":
            turn = {"role": "assistant", "content": given[number % len(given)]}
            number += 1
        result.append(turn)
    return result


def shuffle_targets(records: Sequence[Record], rng: random.Random) -> None:
    """Give each of the records the answers of another of them, where these differ."""
    order = list(range(len(records)))
    rng.shuffle(order)
    given = [answers(record) for record in records]
    for mine, theirs in zip(order, order[1:] + order[:1], strict=True):
        if given[mine] != given[theirs]:
            records[mine]["messages"] = with_answers(records[mine]["messages"], given[theirs])
            records[mine]["kind"] = "shuffled"


def truncated(answer: str, rng: random.Random) -> str:
    """Cut off in the middle of a word, between a fifth and a half of it."""
    return answer[: max(1, round(len(answer) * rng.uniform(0.2, 0.5)))]


def garbled(answer: str, rng: random.Random) -> str:
    """Every second word as a wrong decoding or a bad scan leaves it."""
    places = itertools.count()

    def spoil(match: re.Match[str]) -> str:
        if next(places) % 2:
            return match[0]
        letters = list(match[0])
        rng.shuffle(letters)
        scanned = "".join(letters)
        if scanned != match[0] and rng.random() < 0.7:
            return scanned
        return match[0].encode("utf-16-le").decode("latin-1").replace("\0", "Ã")

    return re.sub(r"\w+", spoil, answer)


def repeated(answer: str, rng: random.Random) -> str:
    """A model in a loop: a few words of it, over and over."""
    words = answer.split()
    start = rng.randrange(max(1, len(words) - 3))
    return " ".join([*words[: start + 3], *words[start : start + 3] * rng.randint(4, 8)])


def refusal(answer: str, rng: random.Random) -> str:
    """A boilerplate that says nothing."""
    return rng.choice(_REFUSALS)


def one_word(answer: str, rng: random.Random) -> str:
    """One of its words."""
    words: list[str] = re.findall(r"\w+", answer)
    return rng.choice(words)


def markup(answer: str, rng: random.Random) -> str:
    """What a careless scraper leaves in."""
    words = answer.split(" ")
    for _ in range(rng.randint(2, 4)):
        words.insert(rng.randrange(len(words) + 1), rng.choice(_DEBRIS))
    return f"<div class='c{rng.randrange(99)}'>{' '.join(words)}</p></div>"


def changed_numbers(answer: str, rng: random.Random) -> str:
    """Every number another one, of as many digits."""
    return re.sub(r"\d+", lambda match: _other_number(match[0], rng), answer)


def _other_number(digits: str, rng: random.Random) -> str:
    while True:
        other = "".join(rng.choice("0123456789") for _ in digits)
        if other != digits:
            return other


# What spoils an answer alone.
SPOILERS: Mapping[str, Callable[[str, random.Random], str]] = {
    "truncated": truncated,
    "garbled": garbled,
    "repeated": repeated,
    "refusal": refusal,
    "one_word": one_word,
    "markup": markup,
    "numbers": changed_numbers,
}
# In parts as equal as the records allow.
MIXED = ("exact", "copy", "shuffled", "language", *SPOILERS)


def can_be(record: Record, kind: str) -> bool:
    """Whether a record's answers can be spoilt in this way and still differ from what they were."""
    given = answers(record)
    if kind == "numbers":
        return any(re.search(r"\d", answer) for answer in given)
    if kind in ("truncated", "garbled", "repeated", "one_word"):
        return all(len(re.findall(r"\w+", answer)) >= LONG_ENOUGH for answer in given)
    return True


def add_mixed(
    records: list[Record], share: float, foreign: Sequence[str], rng: random.Random
) -> list[Record]:
    """Spoil a share of the records, in equal parts of every kind.

    Args:
        records: Clean records, in a random order; those that are spoilt are changed.
        share: Of the result that is dirty, in (0, 1).
        foreign: Texts in other languages than the answers'.
        rng: Draws everything.

    Returns:
        As many records as were given. Copies stand in place of records that are left out; a record
        that is copied has the kind `first`.
    """
    each = max(1, round(share * len(records) / len(MIXED)))
    left, result = list(records), []
    for kind in ("exact", "copy"):
        firsts = [left.pop() for _ in range(-(-each // COPIES_EACH))]
        for first in firsts:
            first["kind"] = "first"
        for number in range(each):
            first = firsts[number % len(firsts)]
            copied = near_copy(first, number, rng) if kind == "copy" else {**first}
            copied |= {"id": f"{first['id']}-{number}", "kind": kind}
            result.append(copied)
            left.pop()
        result += firsts
    # The kinds that fewest records can be come first.
    for kind in sorted(MIXED[2:], key=lambda kind: sum(can_be(r, kind) for r in left)):
        chosen = [record for record in left if can_be(record, kind)][:each]
        names = {record["id"] for record in chosen}
        left = [record for record in left if record["id"] not in names]
        if kind == "shuffled":
            for source in sorted({record["source"] for record in chosen}):
                shuffle_targets([r for r in chosen if r["source"] == source], rng)
        for record in chosen:
            if kind != "shuffled":
                spoilt = [_spoilt(kind, answer, foreign, rng) for answer in answers(record)]
                record |= {"messages": with_answers(record["messages"], spoilt), "kind": kind}
        result += chosen
    result += left
    rng.shuffle(result)
    return result


def _spoilt(kind: str, answer: str, foreign: Sequence[str], rng: random.Random) -> str:
    if kind != "language":
        return SPOILERS[kind](answer, rng)
    text = rng.choice(foreign)
    while len(text) < len(answer):
        text += " " + rng.choice(foreign)
    return text


_REFUSALS = (
    "I'm sorry, but as an AI language model I cannot help with that.",
    "As an AI, I do not have personal opinions, so I am not able to answer this question.",
    "I'm sorry, I don't have enough information to answer.",
    "Sorry, something went wrong. Please try again later.",
    "I cannot fulfil this request.",
    "Please provide more details so that I can assist you better.",
    "N/A",
)
_DEBRIS = (
    "&nbsp;",
    "<br/>",
    "[edit]",
    "<a href='#top'>",
    "Click here to subscribe!",
    "{{citation needed}}",
    "Share on Facebook | Tweet",
    "&amp;quot;",
    "<script>var _gaq=[];</script>",
    "Cookie policy - Accept all",
)
