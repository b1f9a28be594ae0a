"""Traced strings: the same text as plain ones after any operation, and the runs where they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.text.traced import START, Traced, traced, unmark

texts = st.text("ab \n<", max_size=12)
few = st.sampled_from(["a", "ab", " ", "\n", "<", "b<"])
OPERATIONS = {
    "add": lambda text, other: text + other,
    "add before": lambda text, other: other + text,
    "strip": lambda text, other: text.strip(),
    "strip these": lambda text, other: text.strip(other),
    "lstrip": lambda text, other: text.lstrip(),
    "rstrip": lambda text, other: text.rstrip("\n"),
    "slice": lambda text, other: text[1:-1],
    "reversed": lambda text, other: text[::-1],
    "letter": lambda text, other: text[0] if text else text,
    "first": lambda text, other: text.split(other)[0],
    "last": lambda text, other: text.split(other)[-1],
    "words": lambda text, other: (text.split() or [text])[-1],
    "from the right": lambda text, other: text.rsplit(other, 1)[-1],
    "lines": lambda text, other: (text.splitlines(True) or [text])[-1],
    "partition": lambda text, other: text.partition(other)[2],
    "rpartition": lambda text, other: text.rpartition(other)[0],
    "replace": lambda text, other: text.replace(other, "ab"),
    "replace nothing": lambda text, other: text.replace("", "-"),
    "removeprefix": lambda text, other: text.removeprefix(other),
    "removesuffix": lambda text, other: text.removesuffix(other),
}


@settings(max_examples=300, deadline=None)
@given(
    texts, st.lists(st.tuples(st.sampled_from(list(OPERATIONS)), few), max_size=4), st.booleans()
)
def test_any_operation_gives_the_text_that_it_gives_of_a_plain_string(
    text: str, operations: list[tuple[str, str]], inside: bool
) -> None:
    plain: str = text
    shadow: Any = traced(text, 3, inside=inside)
    for name, other in operations:
        plain, shadow = OPERATIONS[name](plain, other), OPERATIONS[name](shadow, other)
        assert shadow == plain
        assert hash(shadow) == hash(plain)
    found, marks = unmark(f"{shadow}")
    assert found == plain
    assert all(mark.owner == 3 for mark in marks)
    # One after the other, none in another.
    assert [mark.position for mark in marks] == sorted(mark.position for mark in marks)
    assert [mark.kind == START for mark in marks] == [n % 2 == 0 for n in range(len(marks))]


@settings(max_examples=200, deadline=None)
@given(texts.filter(str.strip), texts, texts)
def test_what_a_message_said_is_found_where_it_ended_up(text: str, before: str, after: str) -> None:
    whole: Any = (before + traced(text, 0) + after)[len(before) // 2 :].rstrip(" ")
    plain, marks = unmark(str(whole))
    start, stop = marks[0].position, marks[1].position
    kept = (before + text + after)[len(before) // 2 :].rstrip(" ")
    assert plain == kept
    assert start == len(before) - len(before) // 2
    assert plain[start:stop] == kept[start : start + len(text)]


def test_fields_keep_their_names_and_numbers_stay_numbers() -> None:
    message = {"content": ["a", {"text": "b"}], "n": 1}
    shadow = traced(message, 7)
    assert shadow == message
    assert [type(key) for key in shadow] == [str, str]
    assert type(shadow["content"][1]["text"]) is Traced
    assert type(shadow["n"]) is int


def test_only_strings_are_added() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        traced("a", 0) + 1
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + traced("a", 0)
