"""Records of every known shape become messages; those that cannot are dropped for a reason."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.corpus.messages import DropReason, RecordDropped
from slap_stream.corpus.records import (
    COLUMNS,
    has_known_shape,
    normalise,
)

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SYSTEM = {"role": "system", "content": "be kind"}
THOUGHT = {**HI[1], "reasoning_content": "hm"}
WRONG = {**HI[1], "train": False}
IMAGE = {"type": "image", "text": ""}
TEXT = {"type": "text", "text": "hi"}
BAD_TOOLS = DropReason.BAD_TOOLS
TOOLS = [{"a": 1}]
X = {"role": "tool", "content": "x"}
WITH_TOOLS = [{**HI[0], "tools": TOOLS}, HI[1]]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"messages": HI}, HI),
        ({"messages": [SYSTEM, *HI]}, [SYSTEM, *HI]),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "yo"]}}, HI),
        ({"messages": [{"role": "system", "content": " "}, *HI]}, HI),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, HI[1]]},
            HI,
        ),
        ({"messages": [{**turn, "tool_calls": None} for turn in HI]}, HI),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            HI,
        ),
        ({"conversations": {"from": ["human", "gpt"], "value": ["hi", "yo"]}}, HI),
        ({"conversations": HI, "system": "be kind"}, [SYSTEM, *HI]),
        # As tables give what is not there, and what a writer took for bytes.
        ({"messages": math.nan, "prompt": "hi", "completion": "yo", "system": math.nan}, HI),
        ({"prompt": b"hi", "completion": b"yo", "context": b""}, HI),
        ({"messages": json.dumps(HI).encode(), "tools": b"[]"}, HI),
        *(
            ({"conversations": [{"role": user, "text": "hi"}, {"from": bot, "content": "yo"}]}, HI)
            for user, bot in ((" Human ", "GPT"), ("prompter", "Bard"), ("USER", " bing"))
        ),
        *(
            ({"messages": [HI[0], {"role": role, "content": "x"}, HI[1]]}, [HI[0], X, HI[1]])
            for role in ("tool", "tool_call", "function_call", "observation", "ipython")
        ),
        ({"conversations": HI, "system": None}, HI),
        ({"instruction": "hi", "output": "yo"}, HI),
        ({"instruction": "hi", "input": "", "output": "yo"}, HI),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            [
                {"role": "user", "content": "add\n\n1 2"},
                {"role": "assistant", "content": "3"},
            ],
        ),
        ({"prompt": "hi", "completion": "yo"}, HI),
        ({"prompt": HI[:1], "completion": HI[1:]}, HI),
        ({"text": "a document"}, [{"role": "text", "content": "a document"}]),
        ({"messages": HI, "prompt": "hi", "text": "hi yo"}, HI),
        ({"messages": None, "prompt": "hi", "completion": "yo", "text": None}, HI),
        # Fields beside a conversation that belong to it.
        ({"messages": HI, "system": "be kind"}, [SYSTEM, *HI]),
        ({"messages": [SYSTEM, *HI], "system": "be kind"}, [SYSTEM, *HI]),
        ({"system_prompt": "be kind", "question": "hi", "response": "yo"}, [SYSTEM, *HI]),
        ({"instruction": "hi", "output": "yo", "history": [["hi", "yo"]]}, [*HI, *HI]),
        (
            {"instruction": "hi", "output": "yo", "history": [["hi", "yo"]], "system": "be kind"},
            [SYSTEM, *HI, *HI],
        ),
        ({"messages": HI, "tools": [{"a": 1}]}, [{**HI[0], "tools": [{"a": 1}]}, HI[1]]),
        ({"messages": HI, "tools": '[{"a": 1}]'}, [{**HI[0], "tools": [{"a": 1}]}, HI[1]]),
        ({"messages": HI, "tools": "[]", "history": [], "system": ""}, HI),
        # Tools of a turn, which may not be the first one that is kept.
        ({"messages": [{"role": "system", "content": "", "tools": TOOLS}, *HI]}, WITH_TOOLS),
        ({"messages": WITH_TOOLS, "system": "be kind"}, [{**SYSTEM, "tools": TOOLS}, *HI]),
        ({"messages": [SYSTEM, *WITH_TOOLS]}, [{**SYSTEM, "tools": TOOLS}, *HI]),
        ({"messages": [*WITH_TOOLS, *WITH_TOOLS], "tools": TOOLS}, [*WITH_TOOLS, *HI]),
        (
            {"prompt": WITH_TOOLS[:1], "response": "yo", "history": [["hi", "yo"]]},
            [*WITH_TOOLS, *HI],
        ),
        # Fields of a turn.
        *(
            ({"messages": [HI[0], {**HI[1], name: "hm"}]}, [HI[0], THOUGHT])
            for name in ("reasoning_content", "reasoning", "thinking")
        ),
        *(
            ({"messages": [*HI, HI[0], {**HI[1], name: no}]}, [*HI, HI[0], WRONG])
            for name, no in (("weight", 0), ("weight", 0.0), ("train", False), ("loss", False))
        ),
        ({"messages": [HI[0], {**HI[1], "weight": 1, "train": True, "reasoning": ""}]}, HI),
        # Spellings.
        ({"messages": [{"role": "prompter ", "content": "hi"}, HI[1]]}, HI),
        ({"messages": [{"role": "user", "value": "hi"}, {"from": "GPT", "content": "yo"}]}, HI),
        ({"messages": json.dumps(HI)}, HI),
        ({"prompt": b"hi", "response": b"yo"}, HI),
        ({"instruction": "hi", "input": math.nan, "output": "yo", "id": math.nan}, HI),
        ({"instruction": "hi", "context": "", "response": "yo", "source": math.nan}, HI),
        (
            {"conversations": [HI[0], {"from": "function_call", "value": "{}"}, HI[1]]},
            [HI[0], {"role": "tool", "content": "{}"}, HI[1]],
        ),
    ],
)
def test_known_shapes_become_messages(
    fields: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    assert has_known_shape(fields)
    record = normalise(fields)
    assert record.messages == messages
    assert record.id is None
    assert record.source is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([], DropReason.NOT_AN_OBJECT),
        ("text", DropReason.NOT_AN_OBJECT),
        ({}, DropReason.UNKNOWN_SHAPE),
        ({"question": "hi", "solution": "yo"}, DropReason.UNKNOWN_SHAPE),
        ({"instruction": "hi"}, DropReason.UNKNOWN_SHAPE),
        ({"messages": "hi"}, DropReason.MALFORMED),
        ({"messages": ["hi"]}, DropReason.MALFORMED),
        ({"messages": [{"content": "hi"}]}, DropReason.MALFORMED),
        ({"messages": [{"role": 1, "content": "hi"}]}, DropReason.MALFORMED),
        ({"messages": {"role": ["user"], "content": []}}, DropReason.MALFORMED),
        ({"messages": {"role": ["user"]}}, DropReason.EMPTY_TURN),
        ({"messages": [{"role": "text", "content": "hi"}, *HI]}, DropReason.MALFORMED),
        ({"messages": [*HI, {"role": "narrator", "content": "so"}]}, DropReason.UNKNOWN_ROLE),
        ({"messages": [HI[0], {"role": "assistant", "content": 3}]}, DropReason.NOT_TEXT),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, HI[1]]},
            DropReason.NOT_TEXT,
        ),
        ({"text": 3}, DropReason.NOT_TEXT),
        (
            {"messages": [HI[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            DropReason.TOOL_CALL,
        ),
        ({"messages": [HI[0], {"role": "assistant", "content": " \n"}]}, DropReason.EMPTY_TURN),
        ({"messages": [HI[0], {"role": "assistant", "content": None}]}, DropReason.EMPTY_TURN),
        ({"instruction": "hi", "output": ""}, DropReason.EMPTY_TURN),
        ({"text": ""}, DropReason.EMPTY_TURN),
        ({"messages": HI[:1]}, DropReason.NO_ASSISTANT),
        ({"messages": []}, DropReason.NO_ASSISTANT),
        ({"messages": HI, "id": {"a": 1}}, DropReason.BAD_LABEL),
        ({"messages": HI, "source": 0.5}, DropReason.BAD_LABEL),
        ({"text": "yo", "role": "prompter", "parent_id": None}, DropReason.ONE_OF_A_TREE),
        ({"text": "yo", "role": None, "parent_id": "7"}, DropReason.ONE_OF_A_TREE),
        ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, DropReason.BAD_WEIGHT),
        ({"messages": [HI[0], {**HI[1], "train": "no"}]}, DropReason.BAD_WEIGHT),
        ({"messages": [HI[0], {**HI[1], "weight": 0}]}, DropReason.NOTHING_TO_LEARN),
        ({"messages": HI, "history": [["a", "b"]]}, DropReason.BAD_HISTORY),
        ({"prompt": "hi", "answer": "yo", "history": [["a"]]}, DropReason.BAD_HISTORY),
        ({"prompt": "hi", "answer": "yo", "history": "a"}, DropReason.BAD_HISTORY),
        ({"messages": [SYSTEM, *HI], "system": "be rude"}, DropReason.TWO_SYSTEMS),
        ({"messages": HI, "system": "a", "system_prompt": "b"}, DropReason.TWO_SYSTEMS),
        ({"messages": HI, "tools": "not JSON"}, DropReason.BAD_TOOLS),
        ({"messages": HI, "tools": ["area"]}, DropReason.BAD_TOOLS),
        (
            {"messages": [{**HI[0], "tools": [{}]}, HI[1]], "tools": [{"a": 1}]},
            DropReason.BAD_TOOLS,
        ),
        ({"messages": [*HI, *WITH_TOOLS]}, BAD_TOOLS),
        ({"messages": [HI[0], {**HI[1], "tools": TOOLS}]}, BAD_TOOLS),
        ({"messages": [*WITH_TOOLS, {**HI[0], "tools": [{}]}, HI[1]]}, BAD_TOOLS),
        ({"messages": [{"role": "user", "content": [IMAGE, TEXT]}, HI[1]]}, DropReason.NOT_TEXT),
        (
            {"messages": [{"role": "user", "content": [{**TEXT, "image": "x"}]}, HI[1]]},
            DropReason.NOT_TEXT,
        ),
        ({"text": b"\xff"}, DropReason.NOT_UNICODE),
    ],
)
def test_records_that_cannot_be_used_say_why(fields: Any, reason: DropReason) -> None:
    with pytest.raises(RecordDropped) as dropped:
        normalise(fields)
    assert dropped.value.reason is reason


def test_labels_come_from_the_record() -> None:
    record = normalise({"messages": HI, "id": 7, "source": "web", "dataset": "books"})
    assert (record.id, record.source) == ("7", "web")
    record = normalise({"messages": HI, "id": "", "dataset": "books"}, source_field="dataset")
    assert (record.id, record.source) == (None, "books")
    assert normalise({"messages": HI, "source": "web"}, source_field=None).source is None
    assert normalise({"messages": HI, "id": 7.0}).id == "7"
    assert normalise({"messages": HI, "id": b"7", "source": math.nan})[:2] == ("7", None)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"messages": [*HI, {"role": "narrator", "content": "so"}]}, "unknown role: narrator"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "not text: a part of type image"),
        ({"text": 3}, "content that is not text: int"),
        ({"text": "yo", "parent_id": "7"}, "in a row of its own: text with parent_id"),
        ({"b": 1, "a": 2}, "unknown shape: the fields a, b"),
        ({"messages": None, "id": "7"}, "field without a value: messages"),
        ({"prompt": "a", "completion": None}, "field without a value: completion"),
        ({"prompt": None, "answer": None}, "field without a value: prompt and answer"),
        ({"messages": HI, "source": 0.5}, "nor a whole number: float"),
        ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, "nor not: turn with the weight 0.5"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty turn: user"),
        ({"messages": [*HI, *WITH_TOOLS]}, "of objects: a list after the first answer"),
        ({"messages": WITH_TOOLS, "tools": [{}]}, "of objects: two lists that differ"),
    ],
)
def test_a_reason_names_the_value_that_is_to_blame(fields: dict[str, Any], shown: str) -> None:
    with pytest.raises(RecordDropped, match=re.escape(shown)):
        normalise(fields)


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        ({"messages": HI, "id": 1, "source": "web", "system": "a", "tools": None}, ()),
        (
            {"messages": HI, "category": "x", "score": 0.0, "tags": [], "n": math.nan},
            ("category", "score"),
        ),
        ({"messages": HI, "prompt": "hi"}, ("prompt",)),
        ({"text": "a", "system": "b"}, ("system",)),
        (
            {"messages": [{**HI[0], "name": "Ann", "weight": 1}, {**HI[1], "id": 3}]},
            ("id of a turn", "name of a turn", "weight of a turn"),
        ),
        ({"messages": [{**HI[0], "weight": 0, "train": False, "reasoning": None}, HI[1]]}, ()),
        ({"messages": [{**HI[0], "reasoning": "hm"}, HI[1]]}, ("reasoning of a turn",)),
        ({"messages": [HI[0], {**THOUGHT, "reasoning": "hu"}]}, ("reasoning of a turn",)),
        (
            {"messages": [{"role": "text", "content": "a", "tools": TOOLS}]},
            ("tools of a document",),
        ),
    ],
)
def test_fields_that_are_not_used_are_named(
    fields: dict[str, Any], unused: tuple[str, ...]
) -> None:
    assert normalise(fields).unused == unused


TURN_FIELDS = [
    *("role", "content", "from", "value", "text", "messages", "tool_calls", "tools", "train"),
    *("weight", "reasoning_content", "thinking", "name"),
]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(TURN_FIELDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from([*COLUMNS, "source"]),
        _JSON,
    )
)
def test_any_record_is_used_or_dropped(fields: dict[str, Any]) -> None:
    try:
        record = normalise(json.loads(json.dumps(fields)))
    except RecordDropped:
        return
    roles = [message["role"] for message in record.messages]
    assert roles == ["text"] or "assistant" in roles
    assert set(record.unused) <= {*COLUMNS, *(f"{name} of a turn" for name in TURN_FIELDS)}
    assert all(message["content"].strip() for message in record.messages)
    # What a corpus holds can be converted again.
    assert normalise({"messages": record.messages}).messages == record.messages
