"""Records of every known shape become messages; those that cannot are dropped for a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.corpus.records import (
    COLUMNS,
    DropReason,
    RecordDropped,
    has_known_shape,
    normalise,
    parse_line,
)

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SYSTEM = {"role": "system", "content": "be kind"}


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
        ({"question": "hi", "answer": "yo"}, DropReason.UNKNOWN_SHAPE),
        ({"instruction": "hi"}, DropReason.UNKNOWN_SHAPE),
        ({"messages": "hi"}, DropReason.MALFORMED),
        ({"messages": ["hi"]}, DropReason.MALFORMED),
        ({"messages": [{"content": "hi"}]}, DropReason.MALFORMED),
        ({"messages": [{"role": 1, "content": "hi"}]}, DropReason.MALFORMED),
        ({"messages": {"role": ["user"], "content": []}}, DropReason.MALFORMED),
        ({"messages": {"role": ["user"]}}, DropReason.MALFORMED),
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


@pytest.mark.parametrize("line", [b"{", b"\xff", b'{"text": "a"} x', b"[" * 100_000])
def test_lines_that_are_not_json_are_dropped(line: bytes) -> None:
    with pytest.raises(RecordDropped) as dropped:
        parse_line(line)
    assert dropped.value.reason is DropReason.UNREADABLE


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "messages", "tool_calls"]),
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
    assert all(message["content"].strip() for message in record.messages)
    # What a corpus holds can be converted again.
    assert normalise({"messages": record.messages}).messages == record.messages
